"""What a report shows of a selection, as plain data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparing.samples.selection import Selection

BINS = 40
SHOWN = 16
LEVELS = 10
SAMPLED = 1 << 14
"""Samples, spread evenly by id, by which an epoch's share by difficulty is told."""


def kept_by_difficulty(scores: NDArray[np.float32] | None, selection: Selection) -> list[float]:
    """The share of each tenth by score, easiest first, that an epoch's plan takes.

    ``scores``: (N,), those that the plan was made by; [] while none are known. Of a large data
    set a part is looked at, so that it costs a plan next to nothing.
    """
    if scores is None:
        return []
    ids = np.arange(0, scores.size, -(-scores.size // SAMPLED))
    ids = ids[np.isfinite(scores[ids])]
    if ids.size < LEVELS:
        return []
    if selection.code is not None:
        taken = selection.code[ids] != 0
    else:
        taken = np.isin(ids, selection.index)
    order = np.argsort(scores[ids], kind="stable")
    return [float(taken[part].mean()) for part in np.array_split(order, LEVELS)]


def summary(
    scores: NDArray[np.float32],
    times: NDArray[np.uint16],
    lengths: list[int],
    size: int,
    by_difficulty: list[list[float]],
) -> dict[str, Any]:
    """Kept share by epoch and by difficulty, the histogram of scores, and telling samples.

    ``times``: (N,), in how many epochs each sample came; ``by_difficulty`` as above, by epoch. Of
    the histogram the last bin holds the highest hundredth too. ``groups``: samples by id, for the
    task to show.
    """
    found: dict[str, Any] = {
        "size": size,
        "lengths": list(lengths),
        "by_difficulty": by_difficulty,
    }
    seen = np.flatnonzero(np.isfinite(scores))
    if not seen.size or not lengths:
        return found
    values = scores[seen]
    ordered = seen[np.argsort(values, kind="stable")]
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    high = high if high > low else low + 1
    counts, edges = np.histogram(np.minimum(values, high), bins=BINS, range=(low, high))
    always = ordered[times[ordered] >= len(lengths)]
    hardest = ordered[::-1][:SHOWN]
    rest = np.setdiff1d(always, hardest, assume_unique=True)
    rest = rest[np.argsort(scores[rest], kind="stable")][::-1]
    spread = rest[np.arange(min(SHOWN, rest.size)) * rest.size // max(1, min(SHOWN, rest.size))]
    return {
        **found,
        "histogram": {
            "counts": counts.tolist(),
            "edges": [float(edge) for edge in edges],
            "mean": float(values.mean(dtype=np.float64)),
        },
        "never_dropped": int(always.size),
        "groups": [
            {"title": "The hardest, by the latest score", "index": hardest.tolist()},
            {
                "title": "Never left out, from hard to easy, without the hardest",
                "index": spread.tolist(),
            },
            {"title": "The easiest", "index": ordered[:SHOWN].tolist()},
        ],
    }
