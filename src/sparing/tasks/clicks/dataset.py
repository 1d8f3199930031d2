"""The training rows as samples, and the order that an epoch takes them in."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from sparing.tasks.clicks.encoded import Encoded

_BUFFER = 8
"""Blocks of rows on the disk that are mixed with each other."""


@final
class Rows:
    """Encoded rows by their number. ``mapped``: they lie on the disk, in blocks."""

    def __init__(self, data: Encoded, *, mapped: bool = False) -> None:
        self.data, self.mapped = data, mapped

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """``index`` (B,) int64 -> ids (B, F) int64, numeric (B, D) and labels (B,) float32."""
        return self.data.batch(index.long())

    def order(self, generator: torch.Generator) -> Tensor:
        """All rows in random order, (N,) int64, by the generator's seed.

        Rows on the disk are mixed within a few blocks at a time, whose order is random, so that
        reading them is not one jump a row.
        """
        if not self.mapped:
            return torch.randperm(len(self), generator=generator)
        bounds = self.data.bounds
        blocks = torch.randperm(len(bounds) - 1, generator=generator).numpy()
        found = []
        for start in range(0, len(blocks), _BUFFER):
            together = np.concatenate(
                [np.arange(bounds[k], bounds[k + 1]) for k in blocks[start : start + _BUFFER]]
            )
            mixed = torch.randperm(len(together), generator=generator)
            found.append(torch.from_numpy(together)[mixed])
        return torch.cat(found)


def drawn(data: Encoded, rows: int) -> Encoded:
    """That many rows of them by lot, in their order, in memory: the same for every seed."""
    if rows >= len(data):
        return data
    generator = np.random.default_rng(0)
    chosen = np.sort(generator.permutation(len(data))[:rows])
    return data.rows(chosen)
