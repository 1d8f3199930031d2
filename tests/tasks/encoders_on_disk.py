"""Small encoders with tokenizers in Hugging Face's format, written to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "of", "self", "each", "how", "thou")


def tokenizer(pad: int = 0) -> PreTrainedTokenizerFast:
    """Words of a short list; ``pad`` is the id of the padding token."""
    order = list(WORDS[1:])
    order.insert(pad, WORDS[0])
    numbers = {word: number for number, word in enumerate(order)}
    made = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=1000
    )


def shape(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        **more,
    }


def bert(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        BertModel(BertConfig(**shape(max_position_embeddings=20))).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def roberta(folder: Path) -> Path:
    """Of 22 positions, two stand for none: it takes 20 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(6)
        config = RobertaConfig(**shape(max_position_embeddings=22, pad_token_id=1))
        RobertaModel(config).save_pretrained(folder)
    tokenizer(pad=1).save_pretrained(folder)
    return folder
