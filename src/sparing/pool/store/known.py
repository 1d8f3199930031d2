"""What is in the store already, looked up for a whole batch at once."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

_Run = tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.uint32]]


@final
class Known:
    """Keys of 64 or 128 bits in sorted runs; those of 128 bits each with a number of 32 bits.

    Of 128 bits the first 64 and the last 32 are held: hashes of a store's items do not agree in
    these by chance. New keys make a new run, and runs of about one length are merged, so that
    adding is not linear in what is there: log2(n) runs at most, 8 or 16 bytes a key.
    """

    def __init__(self, words: int) -> None:
        """``words`` of 64 bits make a key, 1 or 2."""
        self._words = words
        self._runs: list[_Run] = []

    def add(self, keys: NDArray[np.uint64], values: NDArray[np.int64]) -> None:
        """keys: (n, words), values: (n,) below 2^32; equal keys may be added again."""
        if not len(keys):
            return
        rows = keys.reshape(-1, self._words)
        numbers = values.astype(np.uint32) if self._words == 2 else np.zeros(0, np.uint32)
        run = (rows[:, 0], _last(rows), numbers)
        self._runs.append(self._sorted(run))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            last, before = self._runs.pop(), self._runs.pop()
            self._runs.append(self._sorted(_joined(before, last)))

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """keys: (n, words) -> (n,) the number of a key that is known (0 of 64 bits), else -1."""
        rows = keys.reshape(-1, self._words)
        found, last = np.full(len(rows), -1, np.int64), _last(rows)
        for first, second, values in self._runs:
            place = np.searchsorted(first, rows[:, 0])
            open_ = np.flatnonzero(found < 0)
            place = place[open_]
            # first words may be equal where second words are not: then look at the next ones
            while open_.size:
                inside = place < len(first)
                open_, place = open_[inside], place[inside]
                same = first[place] == rows[open_, 0]
                open_, place = open_[same], place[same]
                if self._words == 1:
                    found[open_] = 0
                    break
                hit = second[place] == last[open_]
                found[open_[hit]] = values[place[hit]]
                open_, place = open_[~hit], place[~hit] + 1
        return found

    @property
    def bytes(self) -> int:
        """How much memory all runs take."""
        return sum(part.nbytes for run in self._runs for part in run)

    def _sorted(self, run: _Run) -> _Run:
        first, second, values = run
        order = np.argsort(first, kind="stable")
        if self._words == 1:
            return first[order], second.copy(), values
        return first[order], second[order], values[order]


def _last(rows: NDArray[np.uint64]) -> NDArray[np.uint32]:
    return rows[:, 1:].reshape(-1).astype(np.uint32)


def _joined(one: _Run, two: _Run) -> _Run:
    return (
        np.concatenate((one[0], two[0])),
        np.concatenate((one[1], two[1])),
        np.concatenate((one[2], two[2])),
    )


def firsts(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each of (n, words) hashes the position of the first one that equals it: (n,)."""
    if not len(hashes):
        return np.zeros(0, np.int64)
    order = np.lexsort(hashes.T[::-1])  # stable: the first of equals comes first
    ranked = hashes[order]
    new = np.ones(len(order), np.bool_)
    new[1:] = (ranked[1:] != ranked[:-1]).any(1)
    leader = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    out = np.empty(len(order), np.int64)
    out[order] = leader
    return out


@final
class Growing:
    """A vector that grows at its end; views of it stay valid and as they were."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._data, self._size = values.copy(), len(values)

    @property
    def all(self) -> NDArray[Any]:
        """What was appended so far."""
        return self._data[: self._size]

    def add(self, values: NDArray[Any]) -> NDArray[Any]:
        """Append (n,) values and give all."""
        end = self._size + len(values)
        if end > len(self._data):
            # few more: memory an item counts more than the copies that this saves
            data = np.empty(max(end, len(self._data) * 33 // 32), self._data.dtype)
            data[: self._size] = self._data[: self._size]
            self._data = data
        self._data[self._size : end] = values
        self._size = end
        return self._data[:end]
