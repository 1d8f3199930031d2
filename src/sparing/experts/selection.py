"""Exactly k experts for each token, whatever the scores, and the weights of those chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Equal groups of neighbouring experts, of which a token may use only its best few.

    count: of groups; kept: groups that each token keeps; best: a group is worth the sum of that
    many of its best scores: 1 in DeepSeek-V2 (arXiv 2405.04434, section 2.2.2), 2 in DeepSeek-V3
    (arXiv 2412.19437, section 2.1.2).
    """

    count: int
    kept: int
    best: int = 2


def best_first(scores: Tensor, active: Tensor) -> Tensor:
    """Scores by which active experts come before all others, whatever they are; (T, E).

    A NaN counts as the lowest score: its token is lost anyway, and must still take k experts.
    """
    lowest, highest = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
    finite = scores.nan_to_num(nan=lowest, posinf=highest, neginf=lowest)
    return finite.masked_fill(~active, -torch.inf)


@torch.no_grad()
def top_k_map(
    scores: Tensor, k: int | Tensor, active: Tensor, groups: Groups | None = None
) -> Tensor:
    """The k best active experts of each token: (T, E) -> (T, E) bool, exactly k in each row.

    k: for all tokens, or (T,) int64 one for each, both at most the number of active experts (more
    is cut to that). Equal scores go to the lowest expert. active: (E,) or (T, E) bool. With
    ``groups``, E a multiple of their count, experts of the kept groups come first; one of another
    group is taken only where those have fewer than k active experts.
    """
    live = active.expand_as(scores)
    if groups is None:
        return _best(scores, k, live)
    within = live & kept_groups(scores, live, groups)
    wanted = _each(k, scores)
    inside = torch.minimum(wanted, within.sum(1))
    chosen = _best(scores, inside, within)
    outside = wanted - inside
    if torch.compiler.is_compiling() or bool(outside.any()):
        chosen = chosen | _best(scores, outside, live & ~within)
    return chosen


def kept_groups(scores: Tensor, live: Tensor, groups: Groups) -> Tensor:
    """The experts of each token's kept groups; scores: (T, E), live: (T, E) bool -> (T, E) bool.

    A group without an active expert is never kept before one that has any.
    """
    size = scores.shape[1] // groups.count
    by_group = best_first(scores, live).view(-1, groups.count, size)
    best = by_group.topk(min(groups.best, size), dim=2).values
    # absent experts add nothing: float64, in which sums of the largest scores stay finite
    worth = torch.where(best.isinf(), 0.0, best.double()).sum(2)
    occupied = live.view(-1, groups.count, size).any(2)
    return _best(worth, groups.kept, occupied).repeat_interleave(size, dim=1)


def _each(k: int | Tensor, scores: Tensor) -> Tensor:
    if isinstance(k, Tensor):
        return k
    return torch.full(scores.shape[:1], k, dtype=torch.int64, device=scores.device)


def _best(scores: Tensor, k: int | Tensor, live: Tensor) -> Tensor:
    """As ``top_k_map`` without groups; live: (T, E). Linear in E where a sort would not be."""
    slots = scores.shape[1]
    if scores.numel() == 0:
        return torch.zeros_like(live)
    if scores.device.type == "cpu" and isinstance(k, int) and not torch.compiler.is_compiling():
        found = _without_ties(scores, min(k, slots), live)
        if found is not None:
            return found
    ranked = best_first(scores, live)
    if isinstance(k, Tensor):
        # a graph does not know how large k is, and may not depend on it
        most = slots if torch.compiler.is_compiling() else max(1, min(int(k.max()), slots))
        top = ranked.topk(most, dim=1).values
        border = top.gather(1, (k.clamp(1, most) - 1)[:, None])
        wanted = k.clamp_max(slots)[:, None]
    else:
        wanted = torch.tensor(min(k, slots), device=scores.device)
        border = ranked.topk(min(k, slots), dim=1).values[:, -1:]
    above = ranked > border
    tied = ranked == border
    missing = wanted - above.sum(1, keepdim=True)
    # where k is 0 the border is the best score, and nothing is missing below it
    return (above | (tied & (tied.cumsum(1) <= missing))) & live


def _without_ties(scores: Tensor, k: int, live: Tensor) -> Tensor | None:
    """The k best where no token has a tie at the border, else None: the usual case, and cheap.

    For the CPU, on which looking at the result costs no wait.
    """
    top = scores.masked_fill(~live, -torch.inf).topk(min(k + 1, scores.shape[1]), dim=1)
    border = top.values[:, k - 1]
    # an infinite border may belong to an inactive slot; a NaN is equal to nothing, not even NaN
    if not bool(border.isfinite().all()):
        return None
    if k < scores.shape[1] and bool((border == top.values[:, k]).any()):
        return None
    return torch.zeros_like(live).scatter_(1, top.indices[:, :k], True)


def normalised(weights: Tensor, chosen: Tensor) -> Tensor:
    """Weights of the chosen experts, divided by their sum; 0 where it is 0, as for padding.

    weights: (T, E), non-negative, differentiable; chosen: (T, E) bool.
    """
    kept = weights * chosen
    total = kept.sum(1, keepdim=True)
    return kept / torch.where(total > 0, total, torch.ones_like(total))
