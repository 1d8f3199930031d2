"""Thresholds that start where the first training batches want them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.core.ranks import sum_

MOST = 1 << 24
"""How many numbers ``torch.quantile`` takes at most."""


@torch.no_grad()
def batch_quantile(values: Tensor, share: float) -> Tensor | None:
    """The quantile of each column of values: (T, E), in float32: (E,); None without any row.

    share: in [0, 1]. The mean over the ranks that have rows: a collective, in which a rank whose
    batch is all padding takes part too. Beyond what torch can sort, the first rows stand for all.
    """
    columns = values.shape[1]
    found = torch.zeros(columns + 1, device=values.device)
    if values.shape[0]:
        rows = values[: max(1, MOST // columns)].float()
        found[:columns] = torch.quantile(rows, share, dim=0)
        found[columns] = 1.0
    sum_([found])
    ranks_with_rows = found[columns]
    return found[:columns] / ranks_with_rows if ranks_with_rows else None
