"""Optimal clusters in one dimension: k-means with the least possible sum of squares.

In one dimension clusters are intervals of the sorted values, so the best borders come from a
dynamic programme (Wang and Song 2011, Ckmeans.1d.dp) and no random start can miss them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError

BINS = 1024
BLOCK = 1 << 22


def borders(values: NDArray[np.float32], clusters: int, *, bins: int = BINS) -> NDArray[np.float32]:
    """The least value of each cluster but the first, rising: (N,) finite values -> (<= k - 1,).

    Exact where there are at most ``bins`` distinct values. Of more, the values are first put into
    about so many bins of equal relative width, and the borders are the best between bins. With
    fewer distinct values than clusters, each is a cluster. Raises RequestError for no values.
    """
    if not values.size:
        raise RequestError("there are no values to cluster")
    first, count, total, square = _histogram(values, bins)
    k = min(clusters, first.size)
    if k == 1:
        return first[:0]
    starts = _best(count, total, square, k)
    return first[starts]


def labels(values: NDArray[np.float32], cuts: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The cluster of each value, from 0: (N,), borders (k - 1,) -> (N,) uint8."""
    found = np.zeros(values.size, dtype=np.uint8)
    for cut in cuts:
        found += values >= cut
    return found


def _histogram(values: NDArray[np.float32], bins: int) -> tuple[NDArray[Any], ...]:
    """Least value, count, sum and sum of squares of each bin that is not empty, rising."""
    distinct = np.unique(values[: bins * 4])
    if values.size <= bins * 4 and distinct.size <= bins:
        each, times = np.unique(values, return_counts=True)
        wide = each.astype(np.float64)
        return each, times, wide * times, wide * wide * times
    low, high = float(values.min()), float(values.max())
    if low == high:
        return _histogram(values[:1], bins)
    # half of the bins are equal in width, half in ratio: losses pile up near their least value
    edges = np.unique(
        np.concatenate(
            [
                np.linspace(low, high, bins // 2, dtype=np.float64),
                low + (high - low) * np.geomspace(1e-6, 1, bins // 2),
            ]
        )[1:].astype(np.float32)
    )
    edges = edges[(edges > low) & (edges <= high)]
    size = edges.size + 1
    count: NDArray[Any]
    count, total, square = (np.zeros(size) for _ in range(3))
    for at in range(0, values.size, BLOCK):
        part = values[at : at + BLOCK]
        place = np.searchsorted(edges, part, side="right")
        wide = part.astype(np.float64)
        count += np.bincount(place, minlength=size)
        total += np.bincount(place, weights=wide, minlength=size)
        square += np.bincount(place, weights=wide * wide, minlength=size)
    full = count > 0
    first = np.concatenate([np.asarray([low], dtype=np.float32), edges])
    return first[full], count[full], total[full], square[full]


def _best(
    count: NDArray[Any], total: NDArray[Any], square: NDArray[Any], k: int
) -> NDArray[np.int64]:
    """Where clusters 2 to k begin among m bins, so that the sum of squares is least."""
    centre = total.sum() / count.sum()  # about the mean, cancellation is least
    square = square - 2 * centre * total + centre * centre * count
    total = total - centre * count
    m = count.size
    c, t, s = (np.append(0.0, np.cumsum(x, dtype=np.float64)) for x in (count, total, square))
    # cost[i, j]: the sum of squares of bins i to j - 1 about their mean, infinite for i >= j
    width = c[None, :] - c[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = (s[None, :] - s[:, None]) - (t[None, :] - t[:, None]) ** 2 / width
    cost = np.where(np.tri(m + 1, dtype=bool), np.inf, np.maximum(cost, 0.0))
    best, came = cost[0], []
    for _ in range(k - 1):
        through = best[:, None] + cost
        start = through.argmin(0)
        came.append(start)
        best = through[start, np.arange(m + 1)]
    starts, end = [], m
    for start in reversed(came):
        end = int(start[end])
        starts.append(end)
    return np.asarray(starts[::-1], dtype=np.int64)
