"""Tiny models of many families, built from configurations without any download."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
TEXT: dict[str, Any] = {
    **SIZES,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 1}
GEMMA: dict[str, Any] = {**DECODER, "head_dim": 16}
GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
VIT: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 4, "num_labels": 3}

ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GEMMA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GEMMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", DECODER),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", DECODER),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**TEXT, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "vocab_size": 50},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny dense model in evaluation mode; ``changes`` go to its configuration."""
    model_class, config_class, options = ZOO[name]
    config = getattr(hf, config_class)(**{**options, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(hf, model_class)(config).eval()


def inputs(model: nn.Module, rows: int = 2, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """A batch for it: tokens (B, S) without padding, or pixels."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, hf.ViTPreTrainedModel):
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, 50, (rows, length), generator=generator)}
