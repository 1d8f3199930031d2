"""What a report shows of a selection, as plain data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 40
SHOWN = 16


def summary(
    scores: NDArray[np.float32], times: NDArray[np.uint16], lengths: list[int], size: int
) -> dict[str, Any]:
    """Kept share by epoch and by difficulty, the histogram of scores, and telling samples.

    ``times``: (N,), in how many epochs each sample came. Of difficulty there are ten classes of
    equally many samples, easiest first, by the latest score.
    """
    seen = np.flatnonzero(np.isfinite(scores))
    found: dict[str, Any] = {"size": size, "kept_share": [length / size for length in lengths]}
    if not seen.size or not lengths:
        return found
    values = scores[seen]
    ordered = seen[np.argsort(values, kind="stable")]
    parts = [part for part in np.array_split(ordered, 10) if part.size]
    counts, edges = np.histogram(values, bins=BINS)
    always = np.flatnonzero(times >= len(lengths))
    hardest = always[np.argsort(-np.nan_to_num(scores[always], nan=-np.inf), kind="stable")]
    return {
        **found,
        "kept_by_difficulty": [float(times[part].mean() / len(lengths)) for part in parts],
        "histogram": {"counts": counts.tolist(), "edges": [float(edge) for edge in edges]},
        "hardest": ordered[::-1][:SHOWN].tolist(),
        "easiest": ordered[:SHOWN].tolist(),
        "never_dropped": hardest[:SHOWN].tolist(),
        "never_dropped_count": int(always.size),
    }
