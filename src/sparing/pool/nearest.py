"""The nearest neighbours of every item, kept right while items come and go.

A row for each item, found by its place: M neighbours' places (3 bytes each, 4 in a set of more than
8 million) and distances (float16). An item that comes brings its own row, and enters the rows of
those that it is nearer to than their M-th: its reverse neighbours. An item that goes leaves gaps,
which are filled anew from the index. No work is done for any other row, and nothing loops over
items in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError

NOBODY: Final = -1
KEEP: Final = 10
"""Neighbours that are kept: 50 bytes an item."""
_SMALL: Final = 1 << 23
"""Places below this are held in 3 bytes."""

Places = NDArray[np.int32]
Floats = NDArray[np.float32]
Pairs = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""(place, neighbour's place, distance), each (p,), in any order, without doubles."""


@final
class Nearest:
    """For each of N places its M nearest, ascending; NOBODY and +inf where there are fewer.

    keep: M. dtype: of the distances.
    """

    def __init__(self, keep: int = KEEP, dtype: Any = np.float16) -> None:
        require_whole("keep", keep, 1)
        self.keep = keep
        self._low: NDArray[np.uint16] = np.empty((0, keep), np.uint16)
        self._high: NDArray[Any] = np.empty((0, keep), np.int8)
        self._far: NDArray[Any] = np.empty((0, keep), dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def who(self) -> Places:
        """The neighbours' places, made anew each time: (N, M)."""
        return self._get(slice(self._size))

    @property
    def distances(self) -> NDArray[Any]:
        """The distances to them: (N, M), ascending, not to be written to."""
        return self._far[: self._size]

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        return self._low.nbytes + self._high.nbytes + self._far.nbytes

    def _get(self, rows: Any) -> Places:
        who: Places = self._high[rows].astype(np.int32)
        who <<= 16
        who |= self._low[rows]
        return who

    def _put(self, rows: Any, who: NDArray[Any]) -> None:
        self._low[rows] = who.astype(np.uint16)
        self._high[rows] = who >> 16

    def radius(self, places: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """The M-th distances, below which a newcomer enters a row; +inf where there is room.

        -inf for places that hold no item.
        """
        last = self.distances[:, -1] if places is None else self.distances[places, -1]
        return last.astype(np.float32)

    def grow_(self, count: int) -> NDArray[np.int64]:
        """Add ``count`` empty rows; returns their places."""
        size = self._size + count
        if size > np.iinfo(np.int32).max:
            raise RequestError(f"a pool holds at most {np.iinfo(np.int32).max} items; split it")
        if size > _SMALL and self._high.dtype == np.int8:
            self._high = self._high.astype(np.int16)
        if size > len(self._far):
            # few more: memory an item counts more than the copies that this saves
            room = max(size, len(self._far) + len(self._far) // 32)
            for name, empty in (("_low", 0xFFFF), ("_high", NOBODY), ("_far", np.inf)):
                old = getattr(self, name)
                new = np.full((room, self.keep), empty, dtype=old.dtype)
                new[: self._size] = old[: self._size]
                setattr(self, name, new)
        places = np.arange(self._size, size)
        self._size = size
        return places

    def set_(self, places: NDArray[Any], who: NDArray[Any], distances: NDArray[Any]) -> None:
        """Replace rows: (n,), and (n, q) each, ascending; NOBODY and +inf where there is none."""
        q = min(self.keep, who.shape[1])
        held = np.full((len(who), self.keep), NOBODY, np.int32)
        held[:, :q] = who[:, :q]
        self._put(places, held)
        self._far[places] = np.inf
        self._far[places, :q] = distances[:, :q]

    def merge_(self, pairs: Pairs) -> NDArray[np.int64]:
        """Enter neighbours into rows where they are near enough; returns the rows that changed.

        A pair whose neighbour a row holds already does nothing.
        """
        at, who, distance = (np.asarray(part) for part in pairs)
        distance = distance.astype(self._far.dtype)
        worth = distance < self._far[at, -1]
        at, who, distance = at[worth], who[worth], distance[worth]
        if not at.size:
            return np.empty(0, np.int64)
        order = np.argsort(keys(distance, at=at), kind="stable")
        at, who, distance = at[order], who[order], distance[order]
        first = np.flatnonzero(np.diff(at, prepend=-1))
        rows: NDArray[np.int64] = at[first].astype(np.int64)
        number = np.repeat(np.arange(rows.size), np.diff(first, append=at.size))
        rank = np.arange(at.size) - first[number]
        few = rank < self.keep  # of more than M newcomers only the nearest M can stay
        width = int(rank[few].max()) + 1
        new_who = np.full((rows.size, width), NOBODY, np.int32)
        new_far = np.full((rows.size, width), np.inf, self._far.dtype)
        new_who[number[few], rank[few]] = who[few]
        new_far[number[few], rank[few]] = distance[few]
        old = self._get(rows)
        known = (new_who[:, :, None] == old[:, None, :]).any(2)
        new_far[known] = np.inf
        new_who[known] = NOBODY
        both_far = np.concatenate([self._far[rows], new_far], 1)
        best = least(both_far, self.keep)
        self._far[rows] = np.take_along_axis(both_far, best, 1)
        self._put(rows, np.take_along_axis(np.concatenate([old, new_who], 1), best, 1))
        return rows

    def leave_(self, places: NDArray[Any]) -> None:
        """Empty rows, of items that are nobody's neighbours."""
        self._low[places], self._high[places] = 0xFFFF, NOBODY
        self._far[places] = -np.inf

    def drop_(self, places: NDArray[Any]) -> NDArray[np.int64]:
        """Empty the rows of items that go; returns the rows that held one of them.

        Those have gaps, and are not right until ``set_`` gives them all of their neighbours again.
        """
        gone = np.zeros(self._size + 1, dtype=bool)  # the last stands for NOBODY
        gone[places] = True
        holding = np.zeros(self._size, dtype=bool)
        for column in range(self.keep):
            holding |= gone[self._get((slice(self._size), column))]
        holding[places] = False
        self.leave_(places)
        return np.flatnonzero(holding)

    def refill_(
        self, rows: NDArray[Any], query: Callable[[NDArray[Any]], tuple[Any, Any]], block: int
    ) -> None:
        """Set rows from ``query(places) -> (distances (n, q), neighbours' places (n, q))``."""
        for at in range(0, len(rows), block):
            part = rows[at : at + block]
            distances, who = query(part)
            self.set_(part, who, distances)

    def keep_(self, stays: NDArray[np.bool_]) -> None:
        """Close the gaps: only places where ``stays``, (N,), is True remain, renumbered.

        No row that stays may hold one that does not.
        """
        number = np.append(np.cumsum(stays) - 1, NOBODY).astype(np.int32)
        who = number[self.who[stays]]
        self._far = self.distances[stays]
        self._low, self._high = np.empty_like(who, np.uint16), np.empty_like(who, self._high.dtype)
        self._put(slice(None), who)
        self._size = len(who)

    def present(self) -> NDArray[np.bool_]:
        """Which places hold an item: (N,)."""
        found: NDArray[np.bool_] = self.distances[:, -1] != -np.inf
        return found

    def state(self) -> dict[str, NDArray[Any]]:
        """Both arrays."""
        return {"who": self.who, "distances": self.distances}

    @staticmethod
    def of(state: dict[str, NDArray[Any]]) -> Nearest:
        """What ``state`` gave, in memory of its own."""
        who, far = state["who"], state["distances"]
        if who.shape != far.shape or who.ndim != 2:
            raise RequestError("the neighbours' places and distances do not fit each other")
        table = Nearest(who.shape[1], far.dtype)
        table.grow_(len(who))
        table._put(slice(len(who)), who)
        table._far[: len(who)] = far
        return table


def keys(distances: NDArray[Any], *, at: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """Numbers ordered as ``distances``, of any shape, or by ``at`` first, below 2^31.

    Distances are not negative, or -inf, whose bits as a whole number have their order; numpy sorts
    whole numbers many times as fast as it sorts float16, or by two arrays.
    """
    bits = distances.astype(np.float32).view(np.int32)
    return bits.astype(np.int64) << 32 if at is None else (at.astype(np.int64) << 32) + bits


def least(distances: NDArray[Any], k: int) -> NDArray[np.int64]:
    """The columns of the k least of each row, ascending, of equal ones the first: (n, m) -> (n, k).

    Distances as for ``keys``; m at least k.
    """
    order = keys(distances) | np.arange(distances.shape[1])
    order.sort(axis=1)
    found: NDArray[np.int64] = order[:, :k] & 0xFFFFFFFF
    return found


def nearest_columns(distances: Floats, k: int) -> tuple[Floats, NDArray[np.int64]]:
    """The k least of each row, ascending: (q, n) -> distances and columns, (q, k) each.

    +inf and -1 where there are fewer. Distances below 0 by rounding become 0.
    """
    q, n = distances.shape
    take = min(k, n)
    out = np.full((q, k), np.inf, np.float32)
    columns = np.full((q, k), NOBODY, np.int64)
    if take and q:
        part = np.argpartition(distances, take - 1, axis=1)[:, :take] if take < n else None
        near = distances if part is None else np.take_along_axis(distances, part, 1)
        order = np.argsort(near, axis=1, kind="stable")[:, :take]
        values = np.take_along_axis(near, order, 1)
        out[:, :take] = np.where(np.isfinite(values), np.maximum(values, 0), np.inf)
        columns[:, :take] = order if part is None else np.take_along_axis(part, order, 1)
        columns[np.isinf(out)] = NOBODY
    return out, columns
