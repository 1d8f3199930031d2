"""Items far from everything: the mean distance to their nearest is far above that of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number
from sparing.core.errors import RequestError

LEAST: Final = 32
"""Fewer items have no bulk to be far from."""
_NORMAL: Final = 0.6745
"""The upper quartile of a normal distribution, in standard deviations."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """outliers (n,) bool; scores (n,), NaN without a neighbour; threshold: the score above it."""

    outliers: NDArray[np.bool_]
    scores: NDArray[np.float32]
    threshold: float


def outliers(
    distances: NDArray[np.floating[Any]],
    neighbours: NDArray[np.integer[Any]] | None = None,
    *,
    factor: float = 6.0,
    groups: Any = None,
) -> Outliers:
    """Items whose score exceeds the median by ``factor`` robust standard deviations.

    distances (n, k): to the nearest, without the item itself, infinity where there are fewer. The
    deviation is taken from the upper half, (75 % - 50 %) / 0.6745, since distances have a long
    upper tail, and neither it nor the median moves when less than a quarter of the items are far.

    With neighbours (n, k), positions, -1 for none, the score is relative to the neighbours' own: a
    sparse region is then no outlier as a whole, and its items are none (the idea of Breunig et al.
    2000, *LOF*). groups (n,), with neighbours: distances to an item's own copies, which are near
    whatever the item is, do not count.
    """
    require_number("factor", factor, 0.0)
    far = np.array(distances, np.float64)
    if far.ndim != 2:
        raise RequestError(f"distances need the shape (n, k), got {far.shape}")
    far[~np.isfinite(far)] = np.nan
    if groups is not None:
        if neighbours is None:
            raise RequestError("groups need the neighbours too, to tell copies among them")
        held = np.asarray(groups)
        far[held[np.asarray(neighbours)] == held[:, None]] = np.nan
    scores = _mean(far.clip(0))
    if neighbours is not None:
        near = np.asarray(neighbours, np.int64)
        around = _mean(np.where((near >= 0) & ~np.isnan(far), scores[near], np.nan))
        floor = 1e-3 * _quantile(scores, 0.5)
        scores = scores / np.maximum(around, max(floor, 1e-12))
    known = scores[~np.isnan(scores)]
    if len(known) < LEAST:
        return Outliers(
            outliers=np.zeros(len(far), bool), scores=scores.astype(np.float32), threshold=np.inf
        )
    middle, upper = np.quantile(known, [0.5, 0.75])
    threshold = float(middle + factor * (upper - middle) / _NORMAL)
    with np.errstate(invalid="ignore"):
        # where the bulk is all alike the deviation is 0, and rounding must not decide
        above = scores > threshold + 1e-6
    return Outliers(outliers=above, scores=scores.astype(np.float32), threshold=threshold)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) of (n, k) without NaN; NaN for rows that hold nothing else."""
    count = (~np.isnan(values)).sum(1)
    total = np.nansum(values, axis=1)
    made: NDArray[np.float64] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return made


def _quantile(values: NDArray[np.float64], share: float) -> float:
    known = values[~np.isnan(values)]
    return float(np.quantile(known, share)) if len(known) else 0.0
