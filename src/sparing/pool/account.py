"""What became of all items of a pool, in numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparing.pool.items import REASONS
from sparing.pool.members import Members


def account(store: Any, members: Members | None) -> dict[str, Any]:
    """Items stored, kept, and dropped by reason; near copies; tenths of the arrivals.

    kept_by_tenth: how many of each tenth of the arrivals are in the choice, and gain_by_tenth
    their mean gain, None where there are none. copies: groups of two near copies or more, and how
    many items they have together.
    """
    reasons = np.empty(0, np.int8) if store is None else store.column("reason")
    counts = np.bincount(reasons, minlength=len(REASONS))
    dropped = {name: int(n) for name, n in zip(REASONS, counts, strict=True) if n}
    for drop in [] if store is None else store.drops():
        if drop.reason != "kept":  # told of, but stored
            dropped[drop.reason] = dropped.get(drop.reason, 0) + 1
    kept = dropped.pop("kept", 0)
    gains = np.empty(0, np.float32) if members is None else members.gains()
    tenths = [part[~np.isnan(part)] for part in np.array_split(gains, 10)]
    sizes = np.empty(0, np.int64)
    if members is not None:
        groups = members.groups
        _, sizes = np.unique(groups.representatives(groups.paired), return_counts=True)
    together = sizes[sizes > 1]
    return {
        "stored": int(reasons.size),
        "kept": kept,
        "dropped": dropped,
        "gain_by_tenth": [float(tenth.mean()) if tenth.size else None for tenth in tenths],
        "kept_by_tenth": [int(tenth.size) for tenth in tenths],
        "copies": {"groups": int(together.size), "items": int(together.sum())},
    }
