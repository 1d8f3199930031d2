"""Sampling text from a byte-level model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparing.core.decoding import continued
from sparing.tasks.language.options import BYTES


def sample(
    model: nn.Module, prompts: Tensor, count: int, *, seed: int, temperature: float = 0.8
) -> Tensor:
    """Continue ``prompts`` (B, P) int64 by ``count`` bytes each: (B, count) int64 on the CPU.

    Draws from its own generator, seeded with ``seed``. A model may have more tokens than there are
    bytes; only bytes are text.
    """
    generator = torch.Generator().manual_seed(seed)
    return continued(
        model, prompts, count, generator=generator, temperature=temperature, tokens=BYTES
    )
