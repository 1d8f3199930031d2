"""The gain: how much an item adds to a set, from the sorted distances of its neighbours.

InfoGrowth (Qin et al., ECCV 2024, arXiv 2405.18347) values an item as it arrives: the mean cosine
distance to its k nearest among the items that came before, where one that is missing counts as
distance 1. That value depends on when the item came: the first of two twins counts, the second
does not. Valued anew against all others, both twins count nothing, and a budget loses both.

Here the gain is that value's expectation when all orders of arrival are equally likely. It needs
no permutations. Of an item and its first m neighbours each is equally likely to come at any place,
so exactly r of the m came before it with probability 1/(m+1), the m-th among them with r/m of
that. The r-th nearest that came before is the m-th neighbour with probability r / (m (m+1)), and
the mean over r = 1..k gives the m-th distance the weight

    1 / (2 k) for m <= k,    (k+1) / (2 m (m+1)) for m > k;

what is left beyond the first M is (k+1) / (2 (M+1)) for M >= k. Of G twins each keeps about
(k+1) / (2 G) of what a single item has: twins share their gain, and none of it is lost.

Items that are known to be there already, such as those picked in the same round, change the
weights: see ``weights``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError

MISSING = 1.0
"""The distance that a neighbour counts with where fewer than k came before."""

Floats = NDArray[np.floating[Any]]


def published(distances: Floats, k: int = 4) -> NDArray[np.float32]:
    """The released rule: (n, m) ascending distances to what came before -> (n,) gains.

    The mean of the first k; +inf, and columns that are not there, count 1.
    """
    found = _listed(distances, k)[:, :k]
    total = np.where(np.isinf(found), MISSING, found).sum(1, dtype=np.float64)
    gains: NDArray[np.float32] = ((total + (k - found.shape[1]) * MISSING) / k).astype(np.float32)
    return gains


def plain_weights(listed: int, k: int) -> NDArray[np.float64]:
    """The weight of the m-th distance for m = 1..listed: (listed,) float64."""
    require_whole("k", k, 1)
    m = np.arange(1, listed + 1, dtype=np.float64)
    s = np.minimum(m, k)
    weights: NDArray[np.float64] = s * (s + 1) / (2 * k * m * (m + 1))
    return weights


def remainder(listed: int, k: int) -> float:
    """The weight of everything beyond the first ``listed`` neighbours, in closed form."""
    require_whole("k", k, 1)
    return (k + 1) / (2 * (listed + 1)) if listed >= k else 1 - listed / (2 * k)


def weights(sure: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """The weights where some neighbours came before for sure: (n, M) bool -> (n, M) float64.

    With s sure and u unsure ones among the first m-1, and t = min(k - s, u + 1), not below 0: a
    sure m-th has t / (k (u+1)), an unsure one t (t+1) / (2 k (u+1) (u+2)). Without sure ones these
    are ``plain_weights``; with all of them sure 1/k each for the first k, the mean distance to the
    k nearest. What is left to 1 in a row belongs to what is beyond its M neighbours.
    """
    require_whole("k", k, 1)
    before = np.cumsum(sure, axis=1, dtype=np.int32) - sure
    unsure = np.arange(sure.shape[1], dtype=np.int32) - before
    t = np.maximum(np.minimum(k - before, unsure + 1), 0).astype(np.float64)
    found: NDArray[np.float64] = t / (k * (unsure + 1.0))
    return np.where(sure, found, found * (t + 1) / (2 * (unsure + 2.0)))


def expected(
    distances: Floats,
    others: int,
    k: int = 4,
    *,
    beyond: Floats | None = None,
    sure: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """The gain as its expectation over random arrival: (n, M) ascending distances -> (n,).

    others: how many other items there are; up to M of them are listed, the rest of a row is +inf.
    beyond: (n,) the mean distance of what is beyond the M-th neighbour, see ``tail``; the M-th
    distance, its lower bound, without it. Where all others are listed the value is exact: nothing
    came before, and the distance counts 1. sure: (n, M), which of the neighbours are there for
    sure.
    """
    found = _listed(distances, k)
    if others < 0:
        raise RequestError(f"others must be at least 0, got {others}")
    listed = found.shape[1]
    if found.size and listed >= others and np.isfinite(found[:, others:]).any():
        raise RequestError(f"{listed} neighbours are listed, but there are {others} others")
    if listed == 0:
        return np.full(len(found), MISSING, dtype=np.float32)
    far = np.where(np.isinf(found), MISSING, found)
    if sure is None:
        weight = plain_weights(listed, k)
        near = far.astype(np.float64) @ weight
        rest: Any = remainder(listed, k)
    else:
        table = weights(sure, k)
        near = np.einsum("nm,nm->n", far, table, dtype=np.float64)
        rest = np.maximum(1 - table.sum(1), 0)
    if others <= listed:
        last: Any = MISSING
    else:
        last = far[:, -1] if beyond is None else np.maximum(beyond, far[:, -1])
    gains: NDArray[np.float32] = (near + rest * last).astype(np.float32)
    return gains


def _listed(distances: Floats, k: int) -> Floats:
    require_whole("k", k, 1)
    if distances.ndim != 2:
        raise RequestError(f"distances must have shape (n, m), got {tuple(distances.shape)}")
    if np.isnan(distances).any():
        raise RequestError("distances must not be NaN; look at what the encoder gives")
    return distances
