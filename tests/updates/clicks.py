"""A tiny model with tables, and CowClip in plain float64 Python."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

ROWS, WIDTH, FIELDS = 40, 6, 3


class Model(nn.Module):
    """One concatenated table, one of linear terms, a dense layer."""

    def __init__(self, *, seed: int = 0, sparse: bool = False, padding: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.table = nn.Embedding(ROWS, WIDTH, sparse=sparse, padding_idx=padding)
            self.linear = nn.Embedding(ROWS, 1, sparse=sparse)
            self.out = nn.Linear(FIELDS * WIDTH, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, FIELDS) to logits (B,)."""
        deep = self.out(self.table(ids).flatten(1)).squeeze(1)
        wide: Tensor = self.linear(ids).sum((1, 2))
        return deep + wide


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids: (B, FIELDS), some far more often than others; labels: (B,)."""
    draw = torch.Generator().manual_seed(seed)
    ids = (torch.rand(size, FIELDS, generator=draw) ** 3 * ROWS).long()
    return ids, (torch.rand(size, generator=draw) < 0.4).float()


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model(ids), labels)


def reference(
    grad: Tensor, weight: Tensor, ids: Any, *, ratio: float, bound: float, fixed: bool = False
) -> Tensor:
    """By the paper's words, a row at a time, in float64."""
    counts = Counter(ids)
    rows = grad.double().tolist()
    for row, values in enumerate(rows):
        if not counts[row]:
            continue
        length = math.sqrt(sum(v * v for v in values))
        own = math.sqrt(sum(v * v for v in weight[row].double().tolist()))
        limit = counts[row] * (bound if fixed else max(ratio * own, bound))
        if length > limit:
            rows[row] = [v * (limit / length) for v in values]
    return torch.tensor(rows, dtype=torch.float64)
