"""How stored items come into the choice, or do not: aligned, grouped, and what is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.alignment import Alignment
from sparing.pool.batch import quality
from sparing.pool.cleaning import Cleaning
from sparing.pool.copies.growing import Changed
from sparing.pool.copies.hashes import Marks
from sparing.pool.copies.images import marks
from sparing.pool.items import REASONS, Drop, Item, Vectors
from sparing.pool.members import Members
from sparing.pool.store import content_hash

Ids = NDArray[np.int64]
KEPT, NEAR_COPY = REASONS.index("kept"), REASONS.index("near copy")
MISALIGNED = REASONS.index("misaligned")


@final
class Intake:
    """Cleans and values what a store has taken in."""

    def __init__(self, clean: Cleaning, seed: int) -> None:
        self.clean = clean
        self._alignment = Alignment(false_keep=clean.misaligned or 0.01, seed=seed)
        self._batch: dict[int, Item] = {}

    def recall(self, store: Any, seed: int) -> None:
        """Calibrate on stored pairs drawn at random: what was seen before it was opened again."""
        if self.clean.misaligned and store.settings["second"] and store.size:
            random = np.random.Generator(np.random.Philox(seed))
            count = min(store.size, self._alignment.sample)
            ids = np.sort(random.choice(store.ids(), count, replace=False))
            vectors = Vectors(main=store.vectors(ids), second=store.vectors(ids, "second"))
            self._alignment.observe_(vectors)
            self._alignment.seen = store.size

    @property
    def threshold(self) -> float:
        """The least cosine of a pair that is kept. Raises RequestError where none is known."""
        found = self._alignment.calibration
        if not np.isfinite(found.threshold):
            raise RequestError(
                f"texts cannot be judged: {found.detail}; a pool of pairs, with "
                "Cleaning(misaligned=) above 0, calibrates it as pairs arrive"
            )
        return found.threshold

    def marks(self, items: Sequence[Item]) -> Marks | None:
        """The perceptual hashes of items, (n,), or None where none has a file of an image."""
        if self.clean.bits < 0 or all(item.image is None for item in items):
            return None
        return marks(items)

    def take(
        self,
        store: Any,
        members: Members,
        ids: Ids,
        items: list[Item],
        vectors: Vectors,
        marks: Marks | None = None,
        *,
        judged: bool = False,
    ) -> list[Drop]:
        """Let new items in; tells which of them are not in the choice.

        marks: see ``marks``. judged: it is known that image and text belong together.
        """
        wrong = np.zeros(ids.size, bool)
        if vectors.second is not None and self.clean.misaligned and ids.size and not judged:
            self._alignment.observe_(vectors)
            wrong = self._alignment.misaligned(vectors)
        self._batch = dict(zip(ids.tolist(), items, strict=True))
        try:
            changed = members.add_(ids, vectors, ~wrong, marks)
            copies = np.flatnonzero((changed.now != changed.ids) & np.isin(changed.ids, ids))
            hashed = members.by_hash(changed.ids[copies], changed.now[copies])
        finally:
            self._batch = {}
        if wrong.any():
            count = int(wrong.sum())
            store.set_column("reason", ids[wrong], np.full(count, MISALIGNED, np.int8))
        regroup(store, changed)
        told = {
            int(ids[at]): Drop(key=items[at].key, reason="misaligned")
            for at in np.flatnonzero(wrong).tolist()
        }
        for at, by_hash in zip(copies.tolist(), hashed.tolist(), strict=True):
            i = int(changed.ids[at])
            detail = f"item {changed.now[at]}" + (", by its perceptual hash" if by_hash else "")
            key = items[i - int(ids[0])].key
            told[i] = Drop(key=key, reason="near copy", detail=detail)
        return [told[i] for i in sorted(told)]

    def details(self, store: Any, ids: Ids) -> tuple[Any, Any]:
        """What decides which of near copies stands for them, see ``copies.ranks``.

        The quality, and by content where that is equal: neither depends on who came first.
        """
        stored = [i for i in ids.tolist() if i not in self._batch]
        read = dict(zip(stored, store.items(np.array(stored, np.int64)), strict=True))
        items = [self._batch[i] if i in self._batch else read[i] for i in ids.tolist()]
        marks = b"".join(content_hash(item) for item in items)
        return [quality(item) for item in items], np.frombuffer(marks, ">u8").reshape(-1, 2)


def regroup(store: Any, changed: Changed) -> None:
    """Write who stands for whom now, and who is in the choice by it."""
    if not changed.ids.size:
        return
    was = store.column("reason")[np.searchsorted(store.ids(), changed.ids)]
    now = np.where(changed.now != changed.ids, NEAR_COPY, KEPT).astype(np.int8)
    other = np.isin(was, (KEPT, NEAR_COPY)) & (now != was)
    if other.any():
        store.set_column("reason", changed.ids[other], now[other])
    store.set_column("group", changed.ids, changed.now)
