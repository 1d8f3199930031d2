"""Encoders and their tokens: a tiny one that is shipped, MiniLM, or any folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from sparing.core.errors import RequestError, RunError
from sparing.core.minilm import minilm
from sparing.core.quiet import quietly
from sparing.tasks.text.tokens import BYTE_VOCABULARY, PAD, Tokens, of_bytes

WEIGHTS: Final = Path(__file__).with_name("data") / "tiny.safetensors"
"""The shipped encoder, made by scripts/pretrain_text_encoder.py; half precision, to be small."""
TINY_POSITIONS: Final = 128
OF_BYTES: Final = ("tiny", "random")
_POSITIONS_FROM_PAD: Final = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
"""Families that number positions from the id of the padding token on."""


def folder(encoder: str) -> Path | None:
    """Where the encoder lies, None for ``tiny`` and ``random``, which read bytes.

    Raises RequestError if it is not there, and says how to get it.
    """
    if encoder in OF_BYTES:
        return None
    if encoder == "minilm":
        path = minilm(", or take another: -s task.encoder=tiny")
    else:
        path = Path(encoder).expanduser()
    if not (path / "config.json").is_file():
        raise RequestError(
            f"there is no encoder in {path}: no config.json; give tiny, random, minilm or the "
            "folder of an encoder in Hugging Face's format"
        )
    return path


def tokenizer(path: Path) -> Any:
    """The folder's tokenizer. Raises RequestError if it has none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise RequestError(
            f"the tokenizer in {path} cannot be read ({_first_line(error)}); the folder needs the "
            "files that the tokenizer's save_pretrained writes"
        ) from error


def tokens(encoder: str, texts: Sequence[str], max_length: int) -> Tokens:
    """The texts' ids, each cut to ``max_length``, with the marks that the encoder expects.

    Raises RequestError for a ``max_length`` that the encoder cannot take, and as ``folder`` does.
    """
    path = folder(encoder)
    if path is None:
        if encoder == "tiny":
            _require_fitting(max_length, TINY_POSITIONS)
        return of_bytes(texts, max_length)
    made = tokenizer(path)
    _require_fitting(max_length, min(_positions(path), made.model_max_length))
    rows = made(list(texts), truncation=True, max_length=max_length)["input_ids"]
    # where there is no padding token any id will do: it is masked
    pad = PAD if made.pad_token_id is None else made.pad_token_id
    return Tokens.of(rows, pad=pad, most=max_length)


def build(encoder: str, max_length: int) -> nn.Module:
    """The encoder in fp32, without a pooler, which would be trained and never used.

    Random weights are drawn from the global generator. Raises RequestError for a folder that
    holds no encoder.
    """
    path = folder(encoder)
    built: Any = _of_bytes(encoder, max_length) if path is None else _pretrained(path)
    if getattr(built, "pooler", None) is not None:
        built.pooler = None
    made: nn.Module = built
    return made


def tiny_config(positions: int = TINY_POSITIONS) -> Any:
    """The shape of the tiny encoder: 260,000 parameters."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=BYTE_VOCABULARY,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=positions,
        type_vocab_size=1,
        pad_token_id=PAD,
    )


def _of_bytes(encoder: str, max_length: int) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import BertModel

    if encoder == "random":
        return BertModel(tiny_config(max_length), add_pooling_layer=False)
    built = BertModel(tiny_config(), add_pooling_layer=False)
    try:
        built.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"the shipped encoder {WEIGHTS.name} cannot be read ({_first_line(error)}); install "
            "sparing again"
        ) from error
    return built


def _pretrained(path: Path) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModel

    _config(path)
    try:
        with quietly():
            return AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RequestError(
            f"the encoder in {path} cannot be read ({_first_line(error)}); put its files there "
            "again"
        ) from error


def _config(path: Path) -> Any:
    """Raises RequestError for a damaged file and for what is not an encoder of text."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the libraries below have no common one for what does not fit
        raise RequestError(
            f"config.json in {path} cannot be read ({_first_line(error)}); put the encoder's own "
            "file there"
        ) from error
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
        raise RequestError(
            f'{path} holds a model of type "{config.model_type}", which is not an encoder of '
            "text alone; give a folder with a BERT, RoBERTa, MiniLM or the like"
        )
    return config


def _require_fitting(max_length: int, most: int) -> None:
    if max_length > most:
        raise RequestError(
            f"max_length {max_length} does not fit: the encoder takes at most {most} tokens"
        )


def _positions(path: Path) -> int:
    """The longest text in tokens by the encoder's table of positions."""
    config = _config(path)
    most: int = getattr(config, "max_position_embeddings", None) or 1 << 30
    if config.model_type in _POSITIONS_FROM_PAD:
        most -= (config.pad_token_id or 0) + 1
    return most


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
