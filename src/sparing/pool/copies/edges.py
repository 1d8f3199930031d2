"""What is held of items that have near copies: who is near whom, and who stands for whom."""

from __future__ import annotations

from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.pool.copies.groups import Ids

_NONE: Final[Ids] = np.empty(0, np.int64)
_RECENT: Final = 1 << 14
"""Edges that are sorted among themselves before they are merged with all others."""


@final
class Edges:
    """An undirected graph over ids, in two sorted tables: all edges, and the recent ones."""

    def __init__(self) -> None:
        self._old: tuple[Ids, Ids] = (_NONE, _NONE)  # both directions, sorted, unique
        self._recent: tuple[Ids, Ids] = (_NONE, _NONE)

    def add(self, first: Any, second: Any) -> None:
        """Edges between ``first`` and ``second`` (p,); known ones change nothing."""
        one, two = np.asarray(first, np.int64), np.asarray(second, np.int64)
        new = np.concatenate([one, two]), np.concatenate([two, one])
        self._recent = _merged(self._recent, new)
        if len(self._recent[0]) > max(_RECENT, len(self._old[0]) // 8):
            self._merge()

    def remove(self, ids: Ids) -> None:
        """All edges of these ids (n,), ascending."""
        self._merge()
        here, there = self._old
        stay = ~(among(here, ids) | among(there, ids))
        self._old = here[stay], there[stay]

    def of(self, ids: Ids) -> tuple[Ids, Ids]:
        """The edges that leave ``ids`` as (here, there)."""
        found = [_leaving(table, ids) for table in (self._old, self._recent)]
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def all(self) -> tuple[Ids, Ids]:
        """Each edge once, the lower id first."""
        self._merge()
        here, there = self._old
        once = here < there
        return here[once], there[once]

    def _merge(self) -> None:
        self._old = _merged(self._old, self._recent)
        self._recent = (_NONE, _NONE)


@final
class Held:
    """Of each item that has near copies its representative, its component, and what ranks it.

    A component holds all items that are connected by near copies. It is named by one of its items;
    one that falls apart when items are removed keeps its name, which costs time, not correctness.
    """

    def __init__(self) -> None:
        self.ids: Ids = _NONE
        """Ascending."""
        self._columns: dict[str, NDArray[Any]] = {}

    def add(self, ids: Ids, quality: Any, hashes: Any) -> None:
        """New items, which stand for themselves."""
        new = {
            "owner": ids,
            "label": ids,
            "quality": np.asarray(quality, np.float64),
            "hashes": hashes,
        }
        every = np.concatenate([self.ids, ids])
        order = np.argsort(every, kind="stable")
        self.ids = every[order]
        for name, values in new.items():
            held = np.asarray(values)
            before = self._columns.get(name, held[:0])
            self._columns[name] = np.concatenate([before, held])[order]

    def remove(self, ids: Ids) -> None:
        """Items (n,), ascending, known or not."""
        stay = ~among(self.ids, ids)
        self.ids = self.ids[stay]
        self._columns = {name: column[stay] for name, column in self._columns.items()}

    def owners(self, ids: Ids) -> Ids:
        """(n,) the representative of each; an item that is not held stands for itself."""
        found = np.array(ids, np.int64)
        known = among(found, self.ids)
        if known.any():
            found[known] = self._columns["owner"][np.searchsorted(self.ids, found[known])]
        return found

    def own(self, ids: Ids, owners: Ids) -> None:
        """Set the representatives of items that are held."""
        if len(ids):
            self._columns["owner"][np.searchsorted(self.ids, ids)] = owners

    def keys(self, ids: Ids) -> tuple[NDArray[Any], NDArray[Any]]:
        """(quality, hashes) of items that are held."""
        at = np.searchsorted(self.ids, ids)
        return self._columns["quality"][at], self._columns["hashes"][at]

    def labels(self, ids: Ids) -> Ids:
        """(n,) the component of each item, which must be held."""
        if not len(ids):
            return _NONE
        found: Ids = self._columns["label"][np.searchsorted(self.ids, ids)]
        return found

    def connected(self, start: Ids) -> Ids:
        """The ids of all components that items (n,), held or not, belong to, ascending."""
        known = start[among(start, self.ids)]
        if not len(known):
            return _NONE
        return self.ids[among(self._columns["label"], np.unique(self.labels(known)))]

    def join(self, one: Ids, two: Ids, new: Ids) -> NDArray[np.bool_]:
        """Items ``one`` and ``two`` (p,) are connected from now on.

        new (n,), ascending: items that were added last. Returns (n,) which of them end up in a
        component with exactly one that was there before.
        """
        alone = np.zeros(len(new), bool)
        if not len(one):
            return alone
        names, at = np.unique(
            np.concatenate([self.labels(one), self.labels(two)]), return_inverse=True
        )
        root = _united(at[: len(one)], at[len(one) :], len(names))
        before = np.bincount(root, ~among(names, new), len(names))  # components that were there
        alone[:] = before[root[np.searchsorted(names, self.labels(new))]] == 1
        label = self._columns["label"]
        moved = np.flatnonzero(among(label, names))
        label[moved] = names[root[np.searchsorted(names, label[moved])]]
        return alone

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that ``load`` takes."""
        return {"ids": self.ids, **self._columns}

    def load(self, state: dict[str, NDArray[Any]]) -> None:
        """Take over ``state()``."""
        self.ids = np.array(state["ids"])
        names = ("owner", "label", "quality", "hashes")
        self._columns = {name: np.array(state[name]) for name in names if name in state}


def among(ids: Ids, ordered: Ids) -> NDArray[np.bool_]:
    """(n,) which of ``ids`` are in ``ordered``, which is ascending."""
    if not len(ordered):
        return np.zeros(len(ids), bool)
    at = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
    found: NDArray[np.bool_] = ordered[at] == ids
    return found


def _united(one: Ids, two: Ids, size: int) -> Ids:
    """(size,) the least member of each one's set, of 0 .. size - 1 joined by edges (p,)."""
    root = np.arange(size)
    while True:
        a, b = root[one], root[two]
        low, high = np.minimum(a, b), np.maximum(a, b)
        open_ = low < high
        if not open_.any():
            return root
        np.minimum.at(root, high[open_], low[open_])
        while (root[root] < root).any():
            root = root[root]


def _leaving(table: tuple[Ids, Ids], ids: Ids) -> tuple[Ids, Ids]:
    here, there = table
    low = np.searchsorted(here, ids, "left")
    count = np.searchsorted(here, ids, "right") - low
    within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    rows = np.repeat(low, count) + within
    return here[rows], there[rows]


def _merged(one: tuple[Ids, Ids], two: tuple[Ids, Ids]) -> tuple[Ids, Ids]:
    """Both tables' edges, sorted, each once."""
    if not len(two[0]):
        return one
    here, there = (np.concatenate([a, b]) for a, b in zip(one, two, strict=True))
    order = np.lexsort((there, here))
    here, there = here[order], there[order]
    once = np.ones(len(here), bool)
    once[1:] = (here[1:] != here[:-1]) | (there[1:] != there[:-1])
    return here[once], there[once]
