"""Thresholds that start where the first training batches want them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sparing.core.ranks import sum_
from sparing.core.recompute import recomputing

MOST = 1 << 24
"""How many numbers ``torch.quantile`` takes at most."""

WIDEST = 14.0
"""A probability's logit is kept within this, so that it stays apart from 0 and 1 in float32."""

Rule = Literal["active", "slots", "together"]


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


def calibrate(
    values: Tensor,
    mask: Tensor | None,
    start: Tensor,
    seen: Tensor,
    active: Tensor,
    *,
    rule: Rule,
    wanted: float,
    batches: int,
) -> Tensor:
    """Move ``start`` to the mean of what the first training batches want; returns what to use.

    values: (T, E), mask: (T,) bool or None, active: (E,) bool; seen: () int64, batches so far,
    counted here. A recomputation of activation checkpointing moves nothing. With several ranks
    the first training forwards are a stated boundary: all take part. What a batch wants, by rule:

    - ``active``: for each expert the value that ``wanted`` of the active experts exceed on
      average, if each takes the same share of tokens; start: (E,).
    - ``slots``: the same, if missing experts leave their share unserved.
    - ``together``: one probability for all, which ``wanted`` of the active experts' values are
      at most; start: (), its logit.

    Use what is returned and not ``start``, which in a graph is not to be read again: generated
    code would reuse its memory in backward.
    """
    arguments = (rule, float(wanted), batches)
    if not torch.compiler.is_compiling():
        _move(values.detach(), mask, start, seen, active, *arguments)
        return start
    # in a graph it is an operator, which sees at run time how many batches there were
    with torch.no_grad():
        moved: Tensor = _operator(values.detach(), mask, start, seen, active, *arguments)
    return moved + (start - start.detach()) if start.requires_grad else moved


@torch.no_grad()
def _move(
    values: Tensor,
    mask: Tensor | None,
    start: Tensor,
    seen: Tensor,
    active: Tensor,
    rule: str,
    wanted: float,
    batches: int,
) -> None:
    before = int(seen)
    if before >= batches or recomputing():
        return
    real = values if mask is None else values[mask]
    share = min(1.0, wanted / (active.shape[0] if rule == "slots" else int(active.sum())))
    if rule == "together":
        found = batch_quantile(real[:, active].reshape(-1, 1), share)
        found = None if found is None else torch.logit(found[0]).clamp(-WIDEST, WIDEST)
    else:
        found = batch_quantile(real, 1.0 - share)
    if found is None:
        return
    moved = start + (found.to(start) - start) / (before + 1)
    start.copy_(moved if rule == "together" else torch.where(active, moved, start))
    seen += 1


@torch.library.custom_op("sparing::calibrate", mutates_args=("start", "seen"))
def _operator(
    values: Tensor,
    mask: Tensor | None,
    start: Tensor,
    seen: Tensor,
    active: Tensor,
    rule: str,
    wanted: float,
    batches: int,
) -> Tensor:
    _move(values, mask, start, seen, active, rule, wanted, batches)
    return start.clone()


@_operator.register_fake
def _(values: Tensor, mask: Tensor | None, start: Tensor, *_arguments: Any) -> Tensor:
    return torch.empty_like(start)
