"""Hugging Face causal language models as tasks read and write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import nn

from sparing.core import registry
from sparing.core.errors import RequestError
from sparing.core.quiet import quietly
from sparing.core.state import replacing

STORIES: Final = "stories260k"


def export(model: nn.Module, path: Path) -> None:
    """Write a model without experts as transformers reads it, whole or not at all."""
    saved: Any = model
    with replacing(path) as aside:
        saved.save_pretrained(aside)


def exported(path: Path) -> nn.Module:
    """What ``export`` wrote, in evaluation mode. Raises RequestError if it cannot be read."""
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RequestError(f"there is no whole language model in {path}: {error}") from error
    return model.eval()


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU for a model without any."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def pretrained(path: str | Path) -> nn.Module:
    """The trained causal model in the directory ``path``, in float32 and evaluation mode.

    A Hugging Face directory, with experts of transformers or none, or one with ``sparing.json``.
    Raises RequestError if there is none, or some of its weights are missing.
    """
    folder = directory(path)
    note = folder / "sparing.json"
    try:
        if note.is_file():
            surgery = json.loads(note.read_text(encoding="utf-8"))["surgeries"][0]
            found = registry.method(surgery["method"]).imported(folder, lambda: nothing(folder))
            return found.float().eval()
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]), quietly():
            model, told = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
    except (OSError, ValueError, KeyError, IndexError, TypeError, SafetensorError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"there is no whole causal language model in {path}: {error}") from error
    lost = sorted(told["missing_keys"])
    if lost:
        raise RequestError(
            f"{path} lacks {len(lost)} of its model's weights ({lost[0]}, ...); give the "
            "directory of a whole trained causal model"
        )
    whole: nn.Module = model.eval()
    return whole


def directory(path: str | Path) -> Path:
    """The path, if a Hugging Face model with weights is there; else RequestError says what is.

    The name ``stories260k`` is the trained model that is shipped, unless there is such a path.
    """
    folder = Path(path)
    if str(path) == STORIES and not folder.exists():
        folder = Path(__file__).parent / "language" / "data" / STORIES
    if not (folder / "config.json").is_file():
        raise RequestError(
            f"there is no model in {path}; give the directory of a trained Hugging Face model, "
            "with config.json and weights"
        )
    if not weights_of(folder):
        raise RequestError(f"{path} has a config.json and no weights; download the model again")
    return folder


def weights_of(folder: Path) -> list[Path]:
    """The files of weights, sorted."""
    return sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))


def tokenizer_of(path: str | Path) -> Any:
    """The tokenizer in the directory. Raises RequestError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"there is no tokenizer in {path}: {error}") from error


def check_vocabulary(model: nn.Module, tokens: int, where: str) -> None:
    """RequestError if a tokenizer of so many tokens has more than the model knows."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(size, int) and tokens > size:
        raise RequestError(
            f"the tokenizer has {tokens} tokens, and the model in {where} knows {size}; take the "
            "tokenizer that belongs to the model"
        )


def check_length(model: nn.Module, length: int, where: str) -> None:
    """RequestError if sequences of this length are longer than the model takes."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and most < length:
        raise RequestError(
            f"seq_len {length} does not fit: the model in {where} takes at most {most} positions"
        )


def nothing(path: Path) -> nn.Module:
    """For a reader that asks for a base. Raises RequestError: causal models have a class."""
    raise RequestError(f"{path} holds experts without the model that they belong to")
