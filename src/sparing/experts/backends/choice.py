"""Which backend computes a layer."""

from __future__ import annotations

import torch

FEW_ROWS = 32
"""Up to this many rows, an accelerator is faster with gathered weights."""


def choose_backend(
    *,
    device: str,
    dtype: torch.dtype,
    rows: int | None,
    experts: int,
    aligned: bool,
    grad: bool,
) -> str:
    """Name the backend for a load: "loop", "grouped", "padded" or "gathered".

    ``rows`` is the number of (token, expert) pairs, None where it is not known (while a graph is
    traced, so that the graph does not depend on it); ``aligned``: all widths are multiples of 16
    bytes; ``grad``: a backward pass will follow.
    """
    if device != "cpu" and dtype != torch.float64:
        if rows is not None and rows <= FEW_ROWS and not grad:
            return "gathered"
        if dtype == torch.bfloat16 and aligned:
            return "grouped"
        if rows is not None and rows <= 4 * experts:
            return "padded"
    return "loop"
