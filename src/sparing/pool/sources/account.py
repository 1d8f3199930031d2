"""What a store tells of itself: counts, sources, and each item that is not kept with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sparing.pool.items import REASONS

if TYPE_CHECKING:
    from sparing.pool.store.view import Reading as AnyView

GAIN: Final = "gain"  # the score with the gains
GROUP: Final = "group"  # the column with the item that stands for a group of near copies


def summary(view: AnyView) -> dict[str, Any]:
    """Counts, gains by tenth of arrival, sources and snapshots of a store, as plain JSON."""
    reasons = view.column("reason")
    counts = np.bincount(reasons, minlength=len(REASONS))
    dropped = Counter({name: int(n) for name, n in zip(REASONS, counts, strict=True) if n})
    kept = dropped.pop("kept", 0)
    unstored = Counter(drop.reason for drop in view.drops())
    twice = unstored.pop("kept", 0)
    names = Counter(str(name) for name in view.column("source"))
    settings = view.settings
    return {
        "stored": int(view.size),
        "kept": int(kept),
        "dropped": dict(sorted((dropped + unstored).items())),
        "same_key_other_content": twice,
        "tenths": tenths(view),
        "encoder": settings["encoder"],
        "dim": settings["dim"],
        "format": settings["format"],
        "sources": [{"name": name, "items": names.get(name, 0)} for name in sorted(view.sources())],
        "snapshots": [
            {"number": s.number, "label": s.label, "items": s.size, "at": s.at}
            for s in view.snapshots()
        ],
    }


def tenths(view: AnyView) -> list[dict[str, Any]]:
    """Of each tenth of the items in arrival order: how many, how many are kept, their mean gain.

    The gain is the one last written with a snapshot, None where no kept item has one.
    """
    found = []
    none = np.full(view.size, np.nan, np.float32)
    gains = view.scores(GAIN) if view.versions(GAIN) else none
    for part, gain in zip(np.array_split(view.alive, 10), np.array_split(gains, 10), strict=True):
        known = gain[part & ~np.isnan(gain)]
        mean = float(known.mean()) if known.size else None
        found.append({"items": int(part.size), "kept": int(part.sum()), "gain": mean})
    return found


def dropped(view: AnyView) -> Iterator[dict[str, Any]]:
    """Each item that is not kept: key, reason, detail, and the id of one that is stored."""
    for drop in view.drops():
        if drop.reason != "kept":
            yield {"key": drop.key, "reason": drop.reason, "detail": drop.detail}
    reasons, keys, ids = view.column("reason"), view.column("key"), view.ids()
    group = view.column(GROUP) if GROUP in view.columns() else None
    for at in np.flatnonzero(reasons).tolist():
        reason = REASONS[reasons[at]]
        detail = ""
        if reason == "near copy" and group is not None:
            detail = f"item {group[at]} stands for it"
        yield {"key": str(keys[at]), "reason": reason, "detail": detail, "id": int(ids[at])}
