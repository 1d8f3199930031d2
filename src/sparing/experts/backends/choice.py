"""Which backend computes a layer.

On a processor the borders are read from benchmarks/records/backend_crossovers.json (one thread of
a Xeon with AVX-512 and no matrix units): a test holds the choice to within 1.15 times the fastest
at 90 % of its points. Those for an accelerator are what others published; nobody measured them
here.
"""

from __future__ import annotations

import torch

FEW_ROWS = 32
"""Without a backward pass, up to this many rows an accelerator gathers weights. Not measured."""

FEW_ROWS_EACH = 64
"""Below this mean number of rows an expert, an accelerator's padded batches. Not measured."""

STREAMED_EACH = 0.5
"""On a processor: up to this mean number of rows an expert weights are streamed."""

GROUPED_EACH = {torch.float32: 128, torch.bfloat16: 32, torch.float16: 32}
"""On a processor: below this mean number of rows an expert one grouped product is the fastest.

The measured loads lie at 64 and 256 rows (float32), and at 16 and 64 (bfloat16; float16 was not
measured and is taken to be like it).
"""


def choose_backend(
    *,
    device: str,
    dtype: torch.dtype,
    rows: int | None,
    experts: int,
    aligned: bool,
    grad: bool,
) -> str:
    """Name the backend for a load.

    "loop", "grouped" or "streamed" on a processor; "gathered", "grouped", "padded" or "loop" on an
    accelerator, by rules that nobody measured. "scattered", the Triton kernels for CUDA, was never
    run on a GPU and is never chosen: ask for it by name.

    ``device``: a device type, as "cpu"; ``dtype``: of the tokens as they are computed; ``rows``:
    the number of (token, expert) pairs, None where it is not known (while a graph is traced: the
    graph must not depend on it); ``aligned``: all widths are multiples of 16 bytes; ``grad``: a
    backward pass will follow.
    """
    if dtype == torch.float64:
        return "loop"
    if device == "cpu":
        if rows is None:
            return "loop"
        if rows <= STREAMED_EACH * experts and not grad:
            return "streamed"
        few = rows < GROUPED_EACH.get(dtype, 0) * experts
        return "grouped" if few and aligned else "loop"
    if rows is not None and rows <= FEW_ROWS and not grad:
        return "gathered"
    if dtype == torch.bfloat16 and aligned:
        return "grouped"
    few = rows is not None and rows < FEW_ROWS_EACH * experts
    return "padded" if few else "loop"
