"""Hidden units to experts by scores: exact partitions, overlap, and units that are always on.

Scores are (n, f): how much each of n clusters of texts needs each of f hidden units. The rules are
those of LLaMA-MoE (arXiv 2406.16554, section 3.1), without its loops over units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.convert.clusters import assign
from sparing.convert.split import sizes


def deal_once(scores: Tensor, residual: int = 0) -> tuple[list[Tensor], Tensor]:
    """Each unit to one expert, those first that would lose most elsewhere ("gradient").

    Clusters that the sum of a unit's scores differs by are compared on one scale: each cluster's
    scores sum to 1. With ``residual`` the units with the highest total are always on, as many as
    that many of n + residual experts have.
    """
    units = scores.shape[1]
    share = _shares(scores)
    each = sizes(units, scores.shape[0] + residual)
    always = share.sum(0).argsort(descending=True, stable=True)[: sum(each[:residual])]
    left = torch.ones(units, dtype=torch.bool)
    left[always] = False
    rest = left.nonzero().flatten()
    labels = assign(-share[:, rest].t(), each[residual:])
    return [rest[labels == expert] for expert in range(scores.shape[0])], always


def overlapping(scores: Tensor, experts: int) -> list[Tensor]:
    """Each expert its cluster's best f / experts units, which others may have too (inner)."""
    each = sizes(scores.shape[1], experts)[0]
    order = scores.argsort(dim=1, descending=True, stable=True)
    return [row[:each] for row in order]


def shared_by_most(scores: Tensor, residual: int) -> tuple[list[Tensor], Tensor]:
    """Units that most clusters count among their best are always on, the rest dealt out (inter).

    n clusters and ``residual`` experts' worth of shared units; of units that equally many want,
    those with the larger share of all scores.
    """
    n, units = scores.shape
    each = sizes(units, n + residual)
    share = _shares(scores)
    best = share.argsort(dim=1, descending=True, stable=True)[:, : max(each)]
    wanted = torch.bincount(best.flatten(), minlength=units).double()
    rank = wanted + share.sum(0) / (share.sum() + 1)
    always = rank.argsort(descending=True, stable=True)[: sum(each[:residual])]
    left = torch.ones(units, dtype=torch.bool)
    left[always] = False
    rest = left.nonzero().flatten()
    labels = assign(-share[:, rest].t(), each[residual:])
    return [rest[labels == expert] for expert in range(n)], always


def _shares(scores: Tensor) -> Tensor:
    found = scores.double().nan_to_num(0.0, 0.0, 0.0)
    return found / found.sum(1, keepdim=True).clamp_min(1e-30)
