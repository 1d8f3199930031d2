"""Where a new expert goes, and what it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.core.ranks import broadcast_
from sparing.experts.frozen_slots import clear_moments_, slot_parameters
from sparing.experts.record import RECENT

if TYPE_CHECKING:
    from sparing.experts.layer import ExpertLayer
    from sparing.experts.router import Router


def _cosines(x: Tensor, router: Router) -> Tensor:
    return F.normalize(x.float(), dim=1) @ F.normalize(router.similarity.float(), dim=1).t()


@torch.no_grad()
def shared_inputs(recent: Tensor) -> Tensor:
    """Rank 0's recent inputs (n, d) on every rank, n at most RECENT, float32."""
    padded = torch.zeros(RECENT, recent.shape[1], device=recent.device)
    padded[: recent.shape[0]] = recent
    count = torch.tensor(recent.shape[0])
    broadcast_([padded, count])
    return padded[: int(count)]


def two_means(x: Tensor, rounds: int = 10) -> Tensor:
    """Split unit vectors x: (n, d), n >= 2, in two by spherical 2-means; True for one half, (n,).

    Starts from the vector farthest from the mean and the one farthest from that, so that the
    result depends on x alone.
    """
    first = x[(x @ x.mean(0)).argmin()]
    second = x[(x @ first).argmin()]
    half = x @ first < x @ second
    for _ in range(rounds):
        if not half.any() or half.all():
            break
        first = F.normalize(x[~half].mean(0), dim=0)
        second = F.normalize(x[half].mean(0), dim=0)
        half = x @ first < x @ second
    return half


@torch.no_grad()
def worst_covered(x: Tensor, router: Router) -> tuple[Tensor, int]:
    """The direction (d,) of unit norm that is covered worst, and the expert that covers it now.

    Of the recent inputs x: (n, d), those that no gate is open for (all, if there are none) fall to
    their best expert; the expert with the largest sum of 1 - cosine over them is split by 2-means
    and the half that it covers worse is where a newcomer is needed. The plain mean of all unserved
    inputs points between their clusters and is nearest to none.
    """
    cosine = _cosines(x, router).masked_fill(~router.active, -2.0)
    best, owner = cosine.max(1)
    threshold = getattr(router, "threshold", None)
    if threshold is not None:
        closed = ~(cosine > threshold).any(1)
        if int(closed.sum()) >= 2:
            x, best, owner = x[closed], best[closed], owner[closed]
    distance = torch.zeros_like(cosine[0]).index_add_(0, owner, 1 - best)
    incumbent = int(distance.argmax())
    group = F.normalize(x[owner == incumbent].float(), dim=1)
    if group.shape[0] < 2:
        return F.normalize(group.sum(0), dim=0), incumbent
    half = two_means(group)
    away = 1 - group @ F.normalize(router.similarity[incumbent].float(), dim=0)
    if away[half].sum() < away[~half].sum():
        half = ~half
    return F.normalize(group[half].mean(0), dim=0), incumbent


@torch.no_grad()
def place_(router: Router, slot: int, direction: Tensor, x: Tensor, share: float) -> None:
    """Give the slot's row a direction (d,), and the threshold that opens for ``share`` of x."""
    length = router.similarity[router.active].norm(dim=1).mean()
    router.similarity[slot] = (F.normalize(direction, dim=0) * length).to(router.similarity.dtype)
    threshold = getattr(router, "threshold", None)
    if threshold is not None:
        cosine = _cosines(x, router)[:, slot]
        level = torch.quantile(cosine, 1.0 - min(1.0, share))
        threshold[slot] = level.to(threshold.dtype)


@torch.no_grad()
def furnish_(
    layer: ExpertLayer,
    slot: int,
    incumbent: int,
    start: Literal["copy", "mean", "fresh"],
    noise: float,
    generator: torch.Generator,
) -> None:
    """Fill the slot's expert weights from the active experts.

    ``copy``: the incumbent's, plus ``noise`` standard deviations of noise; ``mean``: of all active
    experts, with the same noise; ``fresh``: drawn anew, as a new layer's would be. The generator
    lives on the CPU, so that every rank and device draws the same numbers.
    """
    active = layer.router.active
    for weight in layer.experts.slots().values():
        if start == "fresh":
            continue
        alive = weight[active].float()
        random = torch.randn(weight[slot].shape, generator=generator).to(weight.device)
        base = weight[incumbent].float() if start == "copy" else alive.mean(0)
        weight[slot] = (base + noise * alive.std(unbiased=False) * random).to(weight.dtype)
    if start == "fresh":
        layer.experts.init_(slot, generator=generator)
    means = getattr(layer, "output_mean", None)
    if means is not None:
        means[slot] = means[incumbent] if start == "copy" else 0


def forget_(layer: ExpertLayer, slot: int, optimizer: Any) -> None:
    """Clear the optimizer's moments of all of the slot's parameters."""
    if optimizer is not None:
        clear_moments_(optimizer, slot_parameters(layer), slot)
