"""Which backend computes a layer."""

from __future__ import annotations

import torch

FEW_ROWS = 32
"""Without a backward pass, up to this many rows an accelerator gathers weights."""

FEW_ROWS_EACH = 64
"""Below this mean number of rows an expert, one call for all is faster than a loop."""


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

    ``device``: a device type, as "cpu"; ``dtype``: of the tokens as they are computed; ``rows``:
    the number of (token, expert) pairs, None where it is not known (while a graph is traced: the
    graph must not depend on it); ``aligned``: all widths are multiples of 16 bytes; ``grad``: a
    backward pass will follow.
    """
    if dtype == torch.float64:
        return "loop"
    few = rows is not None and rows < FEW_ROWS_EACH * experts
    if device == "cpu":
        if rows is not None and rows <= 8 * experts and not grad:
            return "streamed"
        return "grouped" if few and aligned else "loop"
    if rows is not None and rows <= FEW_ROWS and not grad:
        return "gathered"
    if dtype == torch.bfloat16 and aligned:
        return "grouped"
    return "padded" if few else "loop"
