"""What a store tells of itself: counts, sources, and each item that is not kept with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparing.pool.items import IMAGE_HASH, REASONS

if TYPE_CHECKING:
    from sparing.pool.store.view import Reading as AnyView

GAIN: Final = "gain"  # the score with the gains
_BLOCK: Final = 4096
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
    copies = {of.id: of.words for of in nearness(view)}
    for at in np.flatnonzero(reasons).tolist():
        detail = copies.get(int(ids[at]), "")
        reason = REASONS[reasons[at]]
        yield {"key": str(keys[at]), "reason": reason, "detail": detail, "id": int(ids[at])}


class Nearness(NamedTuple):
    """A near copy: its id, that of the item that stands for it, the cosine distance of the two, and
    by how many of 64 bits their image hashes differ, -1 where one has none.
    """

    id: int
    stands: int
    distance: float
    bits: int

    @property
    def words(self) -> str:
        """All of it, for a reader."""
        said = f"item {self.stands} stands for it, at distance {self.distance:.4f}"
        if self.bits < 0:
            return said
        return f"{said}, {self.bits} of 64 bits of their image hashes differ"


def nearness(view: AnyView, among: NDArray[np.int64] | None = None) -> Iterator[Nearness]:
    """All near copies of a store, or those of ``among``."""
    if GROUP not in view.columns():
        return
    copies = view.column("reason") == REASONS.index("near copy")
    if among is not None:
        copies &= np.isin(view.ids(), among)
    ids, owners = view.ids()[copies], view.column(GROUP)[copies].astype(np.int64)
    hashed = IMAGE_HASH in view.columns()
    marks = view.column(IMAGE_HASH) if hashed else np.zeros(view.size, np.uint64)
    for at in range(0, ids.size, _BLOCK):
        mine, theirs = ids[at : at + _BLOCK], owners[at : at + _BLOCK]
        far = 1 - np.einsum("nd,nd->n", view.vectors(mine), view.vectors(theirs))
        one, two = marks[view.positions(mine)], marks[view.positions(theirs)]
        bits = np.where((one != 0) & (two != 0), np.bitwise_count(one ^ two).astype(int), -1)
        told = zip(mine.tolist(), theirs.tolist(), far.clip(0).tolist(), bits.tolist(), strict=True)
        yield from (Nearness(*row) for row in told)
