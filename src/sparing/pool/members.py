"""Who stands for a group of near copies, and what each of those adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.pool.copies.greedy import Near, Traits
from sparing.pool.copies.groups import pairs, pairs_of_lists
from sparing.pool.copies.growing import Changed, Groups
from sparing.pool.copies.hashes import Hashes, Marks
from sparing.pool.items import Vectors
from sparing.pool.neighbourhood import BLOCK, Discount, Ids, Neighbourhood, Rows
from sparing.pool.neighbours import Joined, Pairs, among, neighbours

OUT, STANDS, COPY = 0, 1, 2
"""Roles: not in the choice; there for itself; a near copy of one that is."""
LISTED: Final = 8
"""Copies that a newcomer is compared with first; what they are connected to follows in full."""


@final
class Members:
    """The items of a pool by role. Only those that stand for a group are neighbours.

    read: (ids, "main" | "second") -> vectors of stored items. details: see ``Groups``. limit: the
    distance up to which items are near copies; below 0 there are none. bits: see ``Near``.
    """

    def __init__(
        self,
        dim: int,
        *,
        read: Callable[[Ids, str], Rows],
        details: Callable[[Ids], tuple[Any, Any]],
        limit: float,
        bits: int = -1,
        kind: str = "auto",
        second: bool = False,
        **options: Any,
    ) -> None:
        self._read, self.limit, self.bits = read, limit, bits
        self.main = Neighbourhood(neighbours(dim, kind), **options)
        self.second = Neighbourhood(neighbours(dim, kind), **options) if second else None
        self.copies = neighbours(dim, kind)
        near = Near(limit=max(limit, 0.0), bits=bits)
        self.groups = Groups(details, traits=self._traits, near=near)
        self._hashes = Hashes(max(bits, 0))  # of those in the choice
        self._marks: Marks = np.empty(0, np.uint64)  # by place; none at all without images
        self._role = np.empty(0, np.uint8)
        self._coming: tuple[Ids, Vectors] = (
            np.empty(0, np.int64),
            Vectors(main=np.empty((0, dim), np.float32)),
        )

    @property
    def ids(self) -> Ids:
        """All items, ascending: (N,)."""
        return self.main.ids

    @property
    def role(self) -> NDArray[np.uint8]:
        """Of each item: (N,)."""
        return self._role

    def gains(self) -> Rows:
        """(N,), NaN where an item does not stand for itself; of pairs the mean of both kinds."""
        gains = self.main.gains()
        if self.second is None:
            return gains
        return ((gains + self.second.gains()) / 2).astype(np.float32, copy=False)

    def discounting(self) -> tuple[Rows, Discount]:
        """As ``Neighbourhood.discounting``; of pairs by both kinds."""
        if self.second is None:
            return self.main.discounting()
        each = [near.discounting() for near in (self.main, self.second)]
        parts = [gains for gains, _ in each]

        def discount_(gains: Rows, places: NDArray[Any]) -> None:
            for part, (_, lower_) in zip(parts, each, strict=True):
                lower_(part, places)
            np.copyto(gains, (parts[0] + parts[1]) / 2, where=~np.isnan(gains))

        both: Rows = ((parts[0] + parts[1]) / 2).astype(np.float32, copy=False)
        return both, discount_

    # ---- items come and go -------------------------------------------------------------------

    def add_(
        self,
        ids: Ids,
        vectors: Vectors,
        wanted: NDArray[np.bool_],
        marks: Marks | None = None,
    ) -> Changed:
        """Items with ids above all others; those not ``wanted``, (n,), get a place only.

        marks: (n,) perceptual hashes, 0 for none. Tells whose representative changed: of the new
        ones those that are copies.
        """
        if marks is not None or self._marks.size:
            none = np.zeros(self._role.size - self._marks.size, np.uint64)
            new = np.zeros(ids.size, np.uint64) if marks is None else marks
            self._marks = np.concatenate([self._marks, none, new])
        parts = []
        for at in range(0, ids.size, BLOCK):
            block = slice(at, at + BLOCK)
            second = None if vectors.second is None else vectors.second[block]
            self._coming = ids[block], Vectors(main=vectors.main[block], second=second)
            for near in self._both():
                near.make_room_(ids[block])
            self._role = np.append(self._role, np.zeros(ids[block].size, np.uint8))
            parts.append(self._take(ids[block][wanted[block]]))
        return _joined(parts)

    def _take(self, ids: Ids) -> Changed:
        """Let a block of new items in, each in its role; one search serves all of it."""
        if not ids.size:
            return _NOTHING
        vectors = self._vectors(ids, "main")
        found = self.main.look(vectors)
        changed, new = _NOTHING, np.ones(ids.size, bool)
        if self._marks.size:
            self._hashes.add(ids, self._of(ids))
        if self.limit >= 0:
            near = self._pairs(ids, vectors, found)
            changed = self.groups.add(near) if len(near) else _NOTHING
            new = self.groups.representatives(ids) == ids
        rows = np.flatnonzero(new)
        number = np.append(np.cumsum(new) - 1, -1)
        at, row, distance = found.pairs
        stay = new[row]
        told = Joined(
            found.distances[rows],
            found.ids[rows],
            Pairs(at[stay], number[row[stay]], distance[stay]),
        )
        self.main.enter_found_(ids[new], vectors[new], told)
        if self.second is not None:
            self.second.enter_(ids[new], self._vectors(ids[new], "second"))
        self._role[self.main.places(ids[new])] = STANDS
        self._copy(ids[~new])
        self._regroup(changed)
        return changed

    def _regroup(self, changed: Changed) -> None:
        """Give items of which another stands for the group now, or none, their new role."""
        role = self._roles(changed.ids)
        own = changed.now == changed.ids
        self._leave(changed.ids[~own & (role == STANDS)], COPY)
        self._promote(changed.ids[own & (role == COPY)])

    def _pairs(self, ids: Ids, vectors: Rows, found: Joined) -> Any:
        own = among(vectors, LISTED)
        lists = [(found.distances, found.ids), (own.distances, np.append(ids, -1)[own.ids])]
        if len(self.copies):
            lists.append(self.copies.query(vectors, LISTED))
        distances = np.concatenate([one[0] for one in lists], 1)
        listed = pairs_of_lists(
            ids, distances, np.concatenate([one[1] for one in lists], 1), self.limit
        )
        if not len(self._hashes):
            return listed
        rows, others = self._hashes.near(self._of(ids))
        one = np.concatenate([listed.first, ids[rows]])
        two = np.concatenate([listed.second, others])
        return pairs(one, two, np.zeros(one.size))

    def leave_(self, ids: Ids) -> None:
        """Items are out of the choice: those that stand for a group, and copies too.

        Copies of one that is out stay copies: they would only take its place.
        """
        role = self._roles(ids)
        self._hashes.remove(ids)
        self._leave(ids[role == STANDS], OUT)
        copies = ids[role == COPY]
        if copies.size:
            self.copies.remove(copies)
            self._role[self.main.places(copies)] = OUT

    def back_(self, ids: Ids) -> Changed:
        """Items that were out are in again, as if they came now: as copies or for themselves.

        Tells whose representative changed, as ``add_``.
        """
        ids = ids[self._roles(ids) == OUT]
        parts = [self._take(ids[at : at + BLOCK]) for at in range(0, ids.size, BLOCK)]
        return _joined(parts)

    def forget_(self, ids: Ids) -> Changed:
        """Items are gone; copies of theirs find others, or stand for themselves."""
        self.leave_(ids)
        changed = self.groups.remove(ids) if self.limit >= 0 else _NOTHING
        self._regroup(changed)
        stays = np.ones(self._role.size, bool)
        stays[self.main.places(ids)] = False
        for near in self._both():
            near.forget_(ids)
        if self._marks.size:
            self._marks = self._marks[stays]
        self._role = self._role[stays]
        return changed

    def _promote(self, ids: Ids) -> None:
        if ids.size:
            main = self.copies.vectors(ids)
            self.copies.remove(ids)
            self._enter(ids, main)

    def _enter(self, ids: Ids, main: Rows | None = None) -> None:
        if not ids.size:
            return
        self.main.enter_(ids, self._vectors(ids, "main") if main is None else main)
        if self.second is not None:
            self.second.enter_(ids, self._vectors(ids, "second"))
        self._role[self.main.places(ids)] = STANDS

    def _leave(self, ids: Ids, role: int) -> None:
        if not ids.size:
            return
        if role == COPY:
            self.copies.add(ids, self.main.index.vectors(ids))
        for near in self._both():
            near.leave_(ids)
        self._role[self.main.places(ids)] = role

    def _copy(self, ids: Ids) -> None:
        if ids.size:
            self.copies.add(ids, self._vectors(ids, "main"))
            self._role[self.main.places(ids)] = COPY

    def named(self) -> dict[str, Neighbourhood]:
        """The items by each kind of vectors: "main", and "second" of pairs."""
        return dict(zip(("main", "second"), self._both(), strict=False))

    def _both(self) -> list[Neighbourhood]:
        return [self.main] if self.second is None else [self.main, self.second]

    def _roles(self, ids: Ids) -> NDArray[np.uint8]:
        return self._role[self.main.places(ids)]

    def _vectors(self, ids: Ids, which: str) -> Rows:
        """Of stored items, or of the batch that is coming, which the store may not have yet."""
        coming, held = self._coming
        at = np.minimum(np.searchsorted(coming, ids), max(coming.size - 1, 0))
        here = coming[at] == ids if coming.size else np.zeros(ids.size, bool)
        rows: Rows | None = held.main if which == "main" else held.second
        if rows is None or not here.any():
            return self._read(ids, which)
        out = np.empty((ids.size, rows.shape[1]), np.float32)
        out[here] = rows[at[here]]
        if not here.all():
            out[~here] = self._read(ids[~here], which)
        return out

    def _traits(self, ids: Ids) -> Traits:
        marks = self._of(ids) if self._marks.size else None
        return Traits(vectors=self._vectors(ids, "main"), marks=marks)

    def _of(self, ids: Ids) -> Marks:
        """The perceptual hashes of items; 0 for none."""
        found: Marks = self._marks[self.main.places(ids)]
        return found

    def by_hash(self, ids: Ids, others: Ids) -> NDArray[np.bool_]:
        """(n,) which of these near copies, of each of ``others``, only their hashes tell of."""
        if not self._marks.size or not ids.size:
            return np.zeros(ids.size, bool)
        one, two = self._vectors(ids, "main"), self._vectors(others, "main")
        far = np.einsum("nd,nd->n", one, two) < np.float32(1 - self.limit)
        found: NDArray[np.bool_] = far & (self._of(ids) != 0) & (self._of(others) != 0)
        return found

    # ---- on the disk -------------------------------------------------------------------------

    def marked_(self, marks: Marks) -> None:
        """The perceptual hashes of all stored items, (n,), before ``align_`` takes them in."""
        self._marks = marks if marks.any() else marks[:0]

    def align_(self, ids: Ids, role: NDArray[np.uint8], owner: Ids) -> Ids:
        """Bring every item to the role that it has in the store.

        ids: all stored items, (n,), those that are known first; role: (n,); owner: (n,), of a copy
        or what was one the item that stood for it, else -1. Returns the copies of items that are
        not stored any more which stand for themselves now.
        """
        new = ids[len(self._role) :]
        for near in self._both():
            near.make_room_(new)
        self._role = np.append(self._role, np.full(new.size, OUT, np.uint8))
        other = np.flatnonzero(self._role != role)
        was, want = self._role[other], role[other]
        for near in self._both():
            near.leave_(ids[other[was == STANDS]])
        if (was == COPY).any():
            self.copies.remove(ids[other[was == COPY]])
        self._role[other] = OUT
        for at in range(0, other.size, 8 * BLOCK):
            part = slice(at, at + 8 * BLOCK)
            self._copy(ids[other[part][want[part] == COPY]])
            self._enter(ids[other[part][want[part] == STANDS]])
        if self._marks.size:
            here = ids[role != OUT]
            self._hashes = Hashes(self._hashes.bits)
            self._hashes.add(here, self._of(here))
        if self.limit < 0:
            return _NONE
        inside, own = ids[other[want != OUT]], owner[other]
        paired = (own >= 0) & np.isin(own, ids)
        found = [(ids[other[paired]], own[paired])]
        for at in range(0, inside.size, BLOCK):
            vectors = self._vectors(inside[at : at + BLOCK], "main")
            near = self._pairs(inside[at : at + BLOCK], vectors, self.main.look(vectors))
            found.append((near.first, near.second))
        one, two = (np.concatenate(side) for side in zip(*found, strict=True))
        if one.size:
            self.groups.add(pairs(one, two, np.zeros(one.size)))
        copies = ids[role == COPY]
        alone: Ids = copies[self.groups.representatives(copies) == copies]
        self._promote(alone)
        return alone

    def state(self) -> dict[str, Any]:
        """All but the indexes, in arrays that share memory; see ``outlines``."""
        parts = {"main": self.main.state(), "groups": self.groups.state()}
        if self.second is not None:
            parts["second"] = self.second.state()
        found = {f"{part}.{k}": v for part, held in parts.items() for k, v in held.items()}
        return {**found, "role": self._role}

    def outlines(self) -> dict[str, Any]:
        """What of the indexes is dear to make again, by name: see ``Neighbours.outline``."""
        found = {name: index.outline() for name, _, index, _ in self._indexes()}
        return {name: outline for name, outline in found.items() if outline is not None}

    def load_(
        self,
        state: Mapping[str, NDArray[Any]],
        outlines: Mapping[str, Any],
        vectors: Callable[[Ids, str], Rows],
    ) -> None:
        """Go on from ``state()``, with vectors as stored.

        An index goes on from its outline; where it has none that fits, it is made anew.
        """
        ids, role = state["main.ids"], state["role"]
        for name, which, index, held in self._indexes():
            mine = ids[role == held]

            def read(some: Ids, which: str = which) -> Rows:
                return vectors(some, which)

            if name not in outlines or not index.resume_(outlines[name], mine, read):
                for at in range(0, mine.size, 64 * BLOCK):
                    index.add(mine[at : at + 64 * BLOCK], read(mine[at : at + 64 * BLOCK]))
        for near, which in zip(self._both(), ("main", "second"), strict=False):
            near.load_(_below(state, which))
        self.groups.load(_below(state, "groups"))
        self._role = role.copy()

    def _indexes(self) -> list[tuple[str, str, Any, int]]:
        """Each index's name, which vectors are in it, itself, and the role of its items."""
        found = [("main", "main", self.main.index, STANDS), ("copies", "main", self.copies, COPY)]
        if self.second is not None:
            found.append(("second", "second", self.second.index, STANDS))
        return found


def _below(state: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    head = f"{name}."
    return {key.removeprefix(head): v for key, v in state.items() if key.startswith(head)}


_NONE = np.empty(0, np.int64)
_NOTHING: Final = Changed(ids=_NONE, before=_NONE, now=_NONE)


def _joined(parts: list[Changed]) -> Changed:
    """What changed in all; of an item that changed twice the last counts."""
    ids = np.concatenate([_NONE, *(part.ids for part in parts)])
    before = np.concatenate([_NONE, *(part.before for part in parts)])
    now = np.concatenate([_NONE, *(part.now for part in parts)])
    _, first = np.unique(ids, return_index=True)
    _, last = np.unique(ids[::-1], return_index=True)
    last = ids.size - 1 - last
    return Changed(ids=ids[first], before=before[first], now=now[last])
