"""Cheaper products to search by: what they round, and how far off they can be.

A search in a coarse type finds candidates; float32 ranks them. Where the bound below leaves open
whether a candidate was missed, the row is searched again in float32, so that nothing is lost.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Final, final

import torch
from torch import Tensor

from sparing.pool.neighbours import blocks
from sparing.pool.neighbours.threads import one_thread

PRECISIONS: Final = ("auto", "float32", "bfloat16", "int8")
REACH: Final = 6.0
"""Standard deviations of an entry that an int8 code reaches. What is beyond is cut, which would
harm products of vectors that are near to each other most: it must not happen."""


@final
class Coarse:
    """How vectors are coded for the search: ``product of codes = scale * cosine``, about.

    slack: by how much a cosine may be off, at most. "float32": 2^-20. "bfloat16": 2^-6, of which
    2^-8 each for rounding both vectors, the product, and what it is compared with.
    "int8": entries are rotated at random, so that none stands out, and rounded to steps of
    6 / (127 sqrt(d)); the sum of such errors is near normal with a deviation of .0193 / sqrt(d),
    of which the slack is five (one pair in three million is beyond).
    """

    def __init__(self, precision: str, dim: int, device: torch.device) -> None:
        self.precision = _fastest(device) if precision == "auto" else precision
        self.dtype = {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "int8": torch.int8,
        }[self.precision]
        self.plain = self.precision == "float32"
        self.scale = 1.0
        self.slack = 2.0**-20 if self.plain else 2.0**-6
        if self.precision == "int8":
            per_entry = 127 * math.sqrt(dim) / REACH
            self.scale = per_entry**2
            deviation = math.sqrt(2 / 12) * REACH / (127 * math.sqrt(dim))
            self.slack = 5 * deviation
            # the step is part of the rotation, which saves a pass over what is coded
            self._turn = (_rotation(dim) * per_entry).float().to(device)

    def code(self, vectors: Tensor) -> Tensor:
        """(n, d) float32 of length 1 -> (n, d) of ``dtype``."""
        if self.precision != "int8":
            return vectors.to(self.dtype)
        turned: Tensor = vectors @ self._turn
        return turned.round_().clamp_(-127, 127).to(torch.int8)

    def bound(self, cosine: Tensor) -> Tensor:
        """Products at or below this belong to cosines below the given ones, (n,) float32."""
        low = (cosine - self.slack) * self.scale
        dtype = torch.int32 if self.precision == "int8" else self.dtype
        low = low.clamp(*blocks.limits(dtype))
        return (low.floor() if self.precision == "int8" else low).to(dtype)


@cache
def _rotation(dim: int) -> Tensor:
    """(d, d) float64, at random and always the same."""
    random = torch.Generator().manual_seed(0)
    with one_thread():
        noise = torch.randn(dim, dim, generator=random, dtype=torch.float64)
        found: Tensor = torch.linalg.qr(noise).Q
    return found


def _fastest(device: torch.device) -> str:
    """Measured by benchmarks/neighbours.py; where unsure, float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    # not part of torch's public interface yet, hence with care
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    multiplies = device.type == "cpu" and known is not None and bool(known())
    return "int8" if multiplies and torch._C._has_mkldnn else "float32"
