"""A trained classifier on disk: configuration, weights and tokenizer. Imports transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel

from sparing.core.errors import RequestError
from sparing.core.state import atomic_save, atomic_write_json, replacing
from sparing.tasks.text.classifier import TextClassifier
from sparing.tasks.text.encoders import tokenizer

FORMAT: Final = 1


def write(
    model: nn.Module, path: Path, classes: tuple[str, ...], max_length: int, folder: Path | None
) -> None:
    """Write ``config.json``, ``model.safetensors`` and, of an encoder in ``folder``, its tokenizer.

    An encoder without a folder reads bytes.
    """
    built: Any = model
    about = {
        "format": FORMAT,
        "classes": list(classes),
        "max_length": max_length,
        "tokens": "bytes" if folder is None else "tokenizer",
        "encoder": built.config.to_dict(),
    }
    with replacing(path) as aside:
        aside.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        atomic_save(aside / "model.safetensors", tensors)
        atomic_write_json(aside / "config.json", about)
        if folder is not None:
            tokenizer(folder).save_pretrained(aside / "tokenizer")


def read(path: Path) -> tuple[TextClassifier, dict[str, Any]]:
    """The classifier in evaluation mode, and what ``config.json`` tells of it.

    Raises RequestError for files that are missing, damaged or of a newer format.
    """
    try:
        about = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise RequestError(
                f"{path} has format {about['format']}, this version reads {FORMAT}; update sparing"
            )
        encoder = AutoModel.from_config(AutoConfig.for_model(**about["encoder"]))
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        model = TextClassifier(encoder, len(about["classes"]))
        model.load_state_dict(load_file(path / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"there is no whole text classifier in {path}: {str(error).splitlines()[0]}"
        ) from error
    return model.eval(), about
