"""Items with their neighbours and gains: an index, the table of the nearest, and the tail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.gain import expected, published
from sparing.pool.nearest import KEEP, NOBODY, Nearest, least, nearest_columns
from sparing.pool.neighbours import Joined, by_row, inside
from sparing.pool.tail import PROBES, Profile, Tail

BLOCK: Final = 1024
"""Items that come together; their own neighbours are found by a product of this size."""
REFIT: Final = 0.05
"""Share by which a large set must change before its tail is learnt anew."""
CHEAP: Final = 50_000
"""Items up to which the tail is learnt anew whenever the set has changed."""

Ids = NDArray[np.int64]
Rows = NDArray[np.float32]
Discount = Callable[[Rows, NDArray[Any]], None]


class Index(Protocol):
    """What finds neighbours, see ``neighbours.Neighbours``; distances are 1 - cosine, by id."""

    def __len__(self) -> int: ...
    def vectors(self, ids: Ids) -> Rows: ...
    def add(self, ids: Ids, vectors: Rows) -> None: ...
    def remove(self, ids: Ids) -> None: ...
    def query(self, vectors: Rows, k: int) -> Any: ...
    def join(self, vectors: Rows, k: int, radius: Any) -> Any: ...


@final
class Neighbourhood:
    """The items of an index and how much each adds.

    index: empty. k: neighbours that the gain is a mean over; keep: neighbours that are kept of
    each item. frozen: gains by the released rule, as of arrival. seed: of the items that the tail
    is learnt from.

    Every item has a place, in the order of ids; only items that were entered, and have not left
    since, are neighbours and have a gain.
    """

    def __init__(
        self, index: Index, *, k: int = 4, keep: int = KEEP, frozen: bool = False, seed: int = 0
    ) -> None:
        self.index = index
        self.k, self.frozen, self.seed = k, frozen, seed
        self.table = Nearest(max(keep, k))
        self._ids: Ids | None = None  # where nothing is missing a place is an id
        self._first: Rows = np.empty(0, np.float32)
        self._tail: tuple[Tail, int, int] | None = None
        self._changes = 0

    def __len__(self) -> int:
        """Items that are neighbours."""
        return len(self.index)

    @property
    def ids(self) -> Ids:
        """The item of each place, ascending: (N,)."""
        return np.arange(len(self.table)) if self._ids is None else self._ids

    # ---- items come and go -------------------------------------------------------------------

    def add_(self, ids: Ids, vectors: Rows) -> None:
        """Items with ids above all others, ascending: (n,), and their vectors (n, d)."""
        self.make_room_(ids)
        self.enter_(ids, vectors)

    def make_room_(self, ids: Ids) -> None:
        """Places for ids above all others, ascending, which nobody has yet."""
        if not ids.size:
            return
        size = len(self.table)
        last = size - 1 if self._ids is None else self._ids[-1] if size else -1
        if ids[0] <= last or (np.diff(ids) <= 0).any():
            raise RequestError("new items need ids above all others, in ascending order")
        if self._ids is not None or ids[-1] != size + ids.size - 1:
            self._ids = np.concatenate([self.ids, ids])
        places = self.table.grow_(ids.size)
        self.table.leave_(places)
        if self.frozen:
            self._first = np.append(self._first, np.full(ids.size, np.nan, np.float32))

    def enter_(self, ids: Ids, vectors: Rows) -> None:
        """Let items that have a place be neighbours; those before them in ``ids`` came before."""
        for at in range(0, ids.size, BLOCK):
            part = slice(at, at + BLOCK)
            self.enter_found_(ids[part], vectors[part], self.look(vectors[part]))

    def look(self, vectors: Rows) -> Joined:
        """Who is near rows (q, d), and to whom they are, as ``enter_found_`` needs it."""
        found: Joined = self.index.join(vectors, self.table.keep, self.radius)
        return found

    def enter_found_(self, ids: Ids, vectors: Rows, stored: Joined) -> None:
        """``enter_`` of at most BLOCK items, ``look`` of whose vectors gave ``stored``.

        Nothing may have come or gone since.
        """
        if not ids.size:
            return  # all that came are copies, say
        keep, places = self.table.keep, self.places(ids)
        one, two, apart = inside(vectors, stored.distances[:, -1], keep)
        near, slots = by_row(one, apart, len(ids), np.float32(np.inf))
        names = np.full(near.shape, NOBODY, np.int64)
        names[one, slots] = places[two]
        far = np.concatenate([stored.distances, near], 1)
        who = np.concatenate([self.places(stored.ids), names], 1)
        best = least(far, keep)
        if self.frozen:
            new = self._as_of_arrival(vectors, stored.distances)
            was = self._first[places]  # of an item that is back again
            self._first[places] = np.where(np.isnan(was), new, was)
        self.table.set_(places, np.take_along_axis(who, best, 1), np.take_along_axis(far, best, 1))
        at, rows, distances = stored.pairs
        self.table.merge_((self.places(at), places[rows], distances))
        self.index.add(ids, vectors)
        self._changes += 1

    def _as_of_arrival(self, vectors: Rows, stored: Rows) -> Rows:
        """Gains by the released rule: among what is stored and the rows before each."""
        between = np.maximum(1 - vectors @ vectors.T, 0)
        before = np.where(np.tri(len(between), k=-1, dtype=bool), between, np.float32(np.inf))
        earlier, _ = nearest_columns(before, self.k)
        return published(np.sort(np.concatenate([stored[:, : self.k], earlier], 1), axis=1), self.k)

    def radius(self, ids: Ids) -> Rows:
        """The distances (n,) below which a newcomer enters these items' lists."""
        return self.table.radius(self.places(ids))

    def leave_(self, ids: Ids) -> None:
        """Items are neighbours no more; the rows that held them are filled anew."""
        if ids.size:
            self.index.remove(ids)
            rows = self.table.drop_(self.places(ids))
            self.table.refill_(rows, self._look_up, BLOCK)
            self._changes += 1

    def forget_(self, ids: Ids) -> None:
        """Take away the places of items; those that are neighbours leave first."""
        self.leave_(ids[self.table.present()[self.places(ids)]])
        stays = np.ones(len(self.table), bool)
        stays[self.places(ids)] = False
        self._ids = self.ids[stays]
        if self.frozen:
            self._first = self._first[stays]
        self.table.keep_(stays)

    def _look_up(self, rows: NDArray[Any]) -> tuple[Rows, Ids]:
        ids = self.ids[rows]
        keep = self.table.keep
        distances, found = self.index.query(self.index.vectors(ids), keep + 1)
        itself = found == ids[:, None]
        # an item among many of its very content may not find itself: then the last goes
        itself[~itself.any(1), -1] = True
        order = np.argsort(itself, axis=1, kind="stable")[:, :keep]
        where = self.places(np.take_along_axis(found, order, 1))
        return np.take_along_axis(distances, order, 1), where

    def places(self, ids: NDArray[Any]) -> Ids:
        """The places of ids, of any shape; NOBODY stays."""
        if self._ids is None:
            return np.asarray(ids, np.int64)
        found = np.searchsorted(self._ids, ids)
        return np.where(np.asarray(ids) == NOBODY, NOBODY, found)

    # ---- on the disk -------------------------------------------------------------------------

    def state(self) -> dict[str, NDArray[Any]]:
        """All but the index."""
        return {**self.table.state(), "ids": self.ids, "first": self._first}

    def load_(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from ``state()``; the index must hold the items that were neighbours then."""
        table = Nearest.of(dict(state))
        if table.keep != self.table.keep or int(table.present().sum()) != len(self.index):
            raise RequestError("the neighbours' table is not that of this index")
        self.table = table
        ids = state["ids"]
        self._ids = None if not ids.size or ids[-1] == ids.size - 1 else ids.copy()
        self._first = state["first"].copy()
        self._changes += 1

    def arrivals(self, ids: Ids) -> Rows:
        """The gains by the released rule, as of arrival, NaN for items never valued: (n,)."""
        return self._first[self.places(ids)]

    def recall_(self, gains: Rows) -> None:
        """Take over gains as of arrival, (N,), where they are not NaN."""
        known = ~np.isnan(gains)
        self._first[known] = gains[known]

    # ---- what they are worth -----------------------------------------------------------------

    def gains(self) -> Rows:
        """The gain of each place, NaN where there is no item: (N,)."""
        here = self.table.present()
        out = np.full(len(self.table), np.nan, np.float32)
        if self.frozen:
            out[here] = self._first[here]
        elif here.any():
            rows = self.table.distances[here]
            beyond = self.tail(rows[:, -1]) if len(self) - 1 > self.table.keep else None
            out[here] = expected(rows, len(self) - 1, self.k, beyond=beyond)
        return out

    def discounting(self) -> tuple[Rows, Discount]:
        """The gains, and what lowers them, in place, when items at some places are picked.

        An item's gain becomes that given that its picked neighbours came before it, whatever the
        order of the others. Gains of the released rule stay as they are.
        """
        sure = np.zeros(len(self.table) + 1, bool)  # the last stands for NOBODY

        def discount_(gains: Rows, places: NDArray[Any]) -> None:
            new = np.zeros_like(sure)
            new[places] = True
            sure[places] = True
            who = self.table.who
            near = np.zeros(len(self.table), bool)
            for column in range(who.shape[1]):
                near |= new[who[:, column]]
            rows = np.flatnonzero(near & ~np.isnan(gains))
            if not rows.size or self.frozen:
                return
            far, others = self.table.distances[rows], len(self) - 1
            beyond = self.tail(far[:, -1]) if others > self.table.keep else None
            gains[rows] = expected(far, others, self.k, beyond=beyond, sure=sure[who[rows]])

        return self.gains(), discount_

    def tail(self, last: NDArray[Any]) -> Rows:
        """The mean distance beyond the M-th neighbour by its distance: (n,) -> (n,).

        Learnt when it is first asked for, and again when the items have changed: see ``tail``.
        """
        size = len(self)
        tail = self._tail
        if tail is not None and tail[2] != self._changes:
            small = size <= CHEAP
            if small or abs(size - tail[1]) > REFIT * tail[1]:
                tail = None
        if tail is None:
            tail = self._tail = (self._learn(), size, self._changes)
        return tail[0](last).astype(np.float32)

    def _learn(self) -> Tail:
        """The tail from items drawn by the seed, compared with all others."""
        here = np.flatnonzero(self.table.present())
        random = np.random.Generator(np.random.SFC64((self.seed, here.size)))
        probes = np.sort(random.choice(here, min(PROBES, here.size), replace=False))
        profile = Profile(self.index.vectors(self.ids[probes]))
        for at in range(0, here.size, 8 * BLOCK):
            part = here[at : at + 8 * BLOCK]
            profile.add_(self.index.vectors(self.ids[part]))
        return Tail.fit(
            self.table.radius(probes).astype(np.float64),
            profile.beyond(self.table.keep, self.k),
        )
