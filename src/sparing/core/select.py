"""Exact selection: asked for k of n, it is k, ties or not."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from sparing.core.errors import RequestError


def rounded(share: float, of: int) -> int:
    """How many a ``share`` of so many is: ``round(share * of)``."""
    return round(share * of)


def choose(
    scores: Tensor, k: int, *, largest: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """The indices of the k best of n scores: (n,) -> (k,) int64, ascending.

    Equal scores at the border go to the lowest index or, given a ``generator`` (on the CPU), to a
    uniform draw from it. Linear in n: no full sort. Raises RequestError for a NaN, for scores
    that are not a vector, and for k outside 0 to n.
    """
    return choose_mask(scores, k, largest=largest, generator=generator).nonzero().squeeze(1)


def choose_mask(
    scores: Tensor, k: int, *, largest: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """``choose`` as a mask: (n,) -> (n,) bool with exactly k True."""
    n = _length(scores, k)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    elif scores.dtype == torch.bool:
        scores = scores.to(torch.uint8)
    # the maximum of numbers is NaN if one of them is
    if n and scores.is_floating_point() and bool(scores.max().isnan()):
        broken = scores.isnan()
        first = int(broken.nonzero()[0])
        raise RequestError(
            f"{int(broken.sum())} of {n} scores are NaN, the first at index {first}; "
            f"a choice among them would be arbitrary: find out where they come from"
        )
    if k in (0, n):
        return torch.full(scores.shape, k > 0, device=scores.device)
    border = _kth(scores, n - k if largest else k - 1)
    better = scores > border if largest else scores < border
    tied = (scores == border).nonzero().squeeze(1)
    missing = k - int(better.count_nonzero())
    if generator is not None:
        order = torch.randperm(tied.numel(), generator=generator).to(tied.device)
        tied = tied[order]
    better[tied[:missing]] = True
    return better


def _kth(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest value, counted from 0, on the scores' device."""
    if scores.device.type != "cpu":
        return scores.kthvalue(k + 1).values
    # the same value, several times faster than by torch
    parted = np.partition(scores.detach().numpy(), k)
    return torch.from_numpy(parted[k : k + 1]).clone()


def weighted_choice(weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw k of n without replacement, each draw in proportion to the weights that are left.

    weights: (n,), non-negative and finite, of any scale -> (k,) int64, ascending. A weight of 0
    is never drawn. Raises RequestError for bad weights, or fewer than k positive ones.

    Efraimidis and Spirakis 2006: the k smallest of n exponential variables with these rates are
    such a draw. In logarithms, so that tiny weights do not overflow.
    """
    n = _length(weights, k)
    wide = weights.to(torch.float64)
    if not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        raise RequestError("weights must be finite and not negative")
    positive = int((wide > 0).sum())
    if positive < k:
        raise RequestError(f"cannot draw {k} of {n} without replacement: {positive} weigh over 0")
    draws = torch.empty(n, dtype=torch.float64, device=generator.device)
    draws.exponential_(generator=generator)
    # zero weights have a key of +inf, behind all that have any chance
    return choose(draws.to(wide.device).log() - wide.log(), k, largest=False)


def allocate(total: int, shares: Tensor) -> Tensor:
    """Split ``total`` things in proportion to shares: (n,) -> (n,) int64 that sum to ``total``.

    Largest remainder (Hamilton), in exact arithmetic; equal remainders go to the lowest index.
    Every count is within 1 of its exact quota, and a share of 0 gets 0. ``shares`` are of any
    scale; n is a number of groups, not of samples. Raises RequestError for shares that are
    negative, not finite or all 0, and for a negative total.
    """
    if total < 0:
        raise RequestError(f"cannot allocate {total} things; the total must be at least 0")
    if shares.ndim != 1:
        raise RequestError(f"shares must be a vector, got shape {tuple(shares.shape)}")
    if shares.is_floating_point() and not bool(torch.isfinite(shares).all()):
        raise RequestError("shares must be finite")
    exact = [Fraction(share) for share in shares.tolist()]
    whole = sum(exact)
    if any(share < 0 for share in exact) or (whole == 0 and total > 0):
        raise RequestError("shares must not be negative, and one must be above 0")
    if whole == 0:
        return torch.zeros(len(exact), dtype=torch.int64)
    quotas = [total * share / whole for share in exact]
    counts = [int(quota) for quota in quotas]
    left = total - sum(counts)
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[:left]:
        counts[i] += 1
    return torch.tensor(counts, dtype=torch.int64)


def _length(values: Tensor, k: int) -> int:
    if values.ndim != 1:
        raise RequestError(f"expected a vector, got shape {tuple(values.shape)}")
    n = int(values.shape[0])
    if not 0 <= k <= n:
        raise RequestError(f"cannot choose {k} of {n}")
    return n
