"""Hugging Face causal language models as tasks read and write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from sparing.core.errors import RequestError
from sparing.core.state import replacing


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
