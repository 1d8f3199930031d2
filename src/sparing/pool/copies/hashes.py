"""Items whose perceptual hashes hardly differ, found in a set that items come to and leave."""

from __future__ import annotations

import itertools
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.pool.copies.edges import among
from sparing.pool.copies.groups import Ids

Marks = NDArray[np.uint64]
MOST: Final = 7
_RECENT: Final = 1 << 12
"""Hashes that are compared one by one before they are sorted in among all others."""
_BLOCK: Final = 1 << 22
_NONE: Final[Ids] = np.empty(0, np.int64)


@final
class Hashes:
    """Hashes of 64 bits by item. Of ``bits`` + 1 parts of two hashes that differ by at most
    ``bits`` one is equal, so only those are compared (Manku, Jain, Sarma 2007).
    """

    def __init__(self, bits: int) -> None:
        require_whole("bits", bits, 0)
        if bits > MOST:
            raise RequestError(
                f"bits must be at most {MOST}, got {bits}: with more, too many hashes share a part"
            )
        self.bits = bits
        edges = np.linspace(0, 64, bits + 2).astype(int)
        self._parts = [
            (np.uint64(low), np.uint64((1 << int(high - low)) - 1))
            for low, high in itertools.pairwise(edges)
        ]
        self._old: tuple[Ids, Marks] = (_NONE, np.empty(0, np.uint64))  # by id
        self._recent: tuple[Ids, Marks] = self._old
        self._index()

    def __len__(self) -> int:
        """Items that have a hash."""
        return int(self._old[0].size + self._recent[0].size)

    def add(self, ids: Ids, marks: Marks) -> None:
        """Items (n,) that are not held, and their hashes; 0 is none."""
        some = marks != 0
        self._recent = (
            np.concatenate([self._recent[0], ids[some]]),
            np.concatenate([self._recent[1], marks[some]]),
        )
        if self._recent[0].size > max(_RECENT, self._old[0].size // 64):
            self._merge()

    def remove(self, ids: Ids) -> None:
        """Items (n,), held or not."""
        if not len(self):
            return
        self._merge()
        held, marks = self._old
        stay = ~among(held, np.sort(ids))
        if not stay.all():
            self._old = held[stay], marks[stay]
            self._index()

    def near(self, marks: Marks) -> tuple[NDArray[np.int64], Ids]:
        """(rows, ids): for each of ``marks`` (n,) that is one, items within ``bits`` of it.

        Of items with one hash a single one is told, which connects all of them. Recent ones are
        compared with each.
        """
        rows = np.flatnonzero(marks)
        values, member = np.unique(marks[rows], return_inverse=True)
        found = [self._sorted_in(values), self._among_recent(values)]
        one = np.concatenate([f[0] for f in found])
        two = np.concatenate([f[1] for f in found])
        # each row has what its value has
        order = np.argsort(one, kind="stable")
        one, two = one[order], two[order]
        begin = np.searchsorted(one, member, "left")
        count = np.searchsorted(one, member, "right") - begin
        step = _steps(count)
        return np.repeat(rows, count), two[np.repeat(begin, count) + step]

    def _sorted_in(self, values: Marks) -> tuple[NDArray[np.int64], Ids]:
        """(place among ``values``, id) of what has been sorted in."""
        one, two = [_NONE], [_NONE]
        for (low, mask), (order, keys) in zip(self._parts, self._tables, strict=True):
            wanted = ((values >> low) & mask).astype(keys.dtype)
            begin = np.searchsorted(keys, wanted, "left")
            count = np.searchsorted(keys, wanted, "right") - begin
            for rows in _blocks(count):
                here = np.repeat(np.arange(rows.start, rows.stop), count[rows])
                there = order[np.repeat(begin[rows], count[rows]) + _steps(count[rows])]
                near = np.bitwise_count(values[here] ^ self._values[there]) <= self.bits
                one.append(here[near])
                two.append(there[near])
        # a pair may share several parts
        pairs = np.unique(np.stack([np.concatenate(one), np.concatenate(two)], 1), axis=0)
        return pairs[:, 0], self._first[pairs[:, 1]]

    def _among_recent(self, values: Marks) -> tuple[NDArray[np.int64], Ids]:
        known, first = np.unique(self._recent[1], return_index=True)
        one, two = np.nonzero(np.bitwise_count(values[:, None] ^ known[None]) <= self.bits)
        return one, self._recent[0][first[two]]

    def _merge(self) -> None:
        if self._recent[0].size:
            ids = np.concatenate([self._old[0], self._recent[0]])
            order = np.argsort(ids, kind="stable")
            self._old = ids[order], np.concatenate([self._old[1], self._recent[1]])[order]
            self._recent = _NONE, self._recent[1][:0]
            self._index()

    def _index(self) -> None:
        held, marks = self._old
        self._values, first = np.unique(marks, return_index=True)
        self._first = held[first]
        self._tables = []
        for low, mask in self._parts:
            key = ((self._values >> low) & mask).astype(np.min_scalar_type(int(mask)))
            order = np.argsort(key, kind="stable").astype(np.uint32)
            self._tables.append((order, key[order]))


def _steps(count: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... up to each count, one run after the other."""
    return np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)


def _blocks(count: NDArray[np.int64]) -> list[slice]:
    """Rows in runs of about _BLOCK pairs."""
    total = np.cumsum(count)
    if not len(total) or not total[-1]:
        return []
    cuts = np.searchsorted(total, np.arange(_BLOCK, total[-1], _BLOCK))
    edges = np.unique(np.concatenate([[0], cuts + 1, [len(count)]])).clip(0, len(count))
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]
