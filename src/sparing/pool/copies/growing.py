"""Groups of near copies in a set that grows: the same groups as of the whole set at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.copies.edges import Edges, Held, among
from sparing.pool.copies.greedy import Near, Traits, owners
from sparing.pool.copies.groups import Ids, Pairs, pairs, ranks, representatives


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """Items whose representative is another now: ids (n,), and theirs before and now, (n,) each."""

    ids: Ids
    before: Ids
    now: Ids


@final
class Groups:
    """The representative of each item, kept up to date; only items that have a near copy cost.

    details: ``ids (n,) -> (quality (n,), hashes (n,) or (n, w))``, see ``copies.ranks``; asked of
    an item once, when its first near copy comes. traits: ``ids (n,) -> Traits``, with ``near``;
    then the items that are connected are compared in full, so that neighbour lists too short for a
    mass of copies do no harm. Without them the pairs given decide, and they must be all that are
    within the limit for the groups to be free of order.
    """

    def __init__(
        self,
        details: Callable[[Ids], tuple[Any, Any]],
        *,
        traits: Callable[[Ids], Traits] | None = None,
        near: Near | None = None,
    ) -> None:
        if (traits is None) != (near is None):
            raise RequestError("comparing items in full needs both traits= and near=")
        self._details, self._traits, self._near = details, traits, near
        self._edges = Edges() if traits is None else None
        self._held = Held()

    def add(self, found: Pairs) -> Changed:
        """Take in pairs, of new items with any, and tell which representatives changed."""
        both = np.unique(np.concatenate([found.first, found.second]))
        new = both[~among(both, self._held.ids)]
        if len(new):
            self._held.add(new, *self._details(new))
        alone = self._held.join(found.first, found.second, new)
        if self._edges is not None:
            self._edges.add(found.first, found.second)
            return self._settle(self._held.connected(both))
        quick = self._follow(new[alone])
        done = np.isin(self._held.labels(both), self._held.labels(quick.ids))
        slow = self._settle(self._held.connected(both[~done]))
        return Changed(
            ids=np.concatenate([quick.ids, slow.ids]),
            before=np.concatenate([quick.before, slow.before]),
            now=np.concatenate([quick.now, slow.now]),
        )

    def remove(self, ids: Any) -> Changed:
        """Items are gone: members of the groups they stood for find others."""
        gone = np.unique(np.asarray(ids, np.int64))
        touched = self._held.connected(gone)
        self._held.remove(gone)
        if self._edges is not None:
            self._edges.remove(gone)
        return self._settle(np.setdiff1d(touched, gone))

    def representatives(self, ids: Any) -> Ids:
        """(n,) the representative of each, its own id where it stands for itself."""
        return self._held.owners(np.asarray(ids, np.int64))

    def members(self, representative: int) -> Ids:
        """The ids of a group, ascending, its representative among them."""
        around = self._held.connected(np.array([representative], np.int64))
        group: Ids = around[self._held.owners(around) == representative]
        return group

    @property
    def paired(self) -> Ids:
        """The ids of all items that have or had a near copy, ascending."""
        return self._held.ids

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that ``load`` takes."""
        edges = (self._edges or Edges()).all()
        return {"first": edges[0], "second": edges[1], **self._held.state()}

    def load(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from ``state()``; what was there before is dropped."""
        self._held = Held()
        self._held.load(state)
        if self._edges is not None:
            self._edges = Edges()
            self._edges.add(state["first"], state["second"])

    def _follow(self, new: Ids) -> Changed:
        """Give new items to a better representative that is near: then nothing else changes.

        new (n,): each joined one component that was there before, and connects it with no other.
        Told are those items of which all that joined their component found one; the others are
        left as they are. So a mass of copies is not compared anew with each that comes.
        """
        assert self._traits is not None
        assert self._near is not None
        around = self._held.connected(new)
        stands = around[self._held.owners(around) == around]
        stands = np.setdiff1d(stands, new)
        if not len(stands) or not len(new):
            return _NOTHING
        rank = ranks(*self._held.keys(np.concatenate([stands, new])))
        best = np.argsort(rank[: len(stands)], kind="stable")
        stands, order = stands[best], rank[best]
        table = self._near.table(self._traits(new), self._traits(stands))
        table &= order[None, :] < rank[len(stands) :, None]
        part = self._held.labels(new)
        table &= part[:, None] == self._held.labels(stands)[None, :]
        found = table.any(1)
        fine = found & ~np.isin(part, part[~found])
        now = stands[table[fine].argmax(1)]
        self._held.own(new[fine], now)
        return Changed(ids=new[fine], before=new[fine], now=now)

    def _settle(self, touched: Ids) -> Changed:
        if not len(touched):
            return _NOTHING
        rank = ranks(*self._held.keys(touched))
        if self._edges is None:
            assert self._traits is not None
            assert self._near is not None
            now = touched[owners(self._traits(touched), rank, self._near)]
            # nearness that no list told of connects too
            self._held.join(touched, now, touched[:0])
        else:
            first, second = self._edges.of(touched)
            now = representatives(pairs(first, second, np.zeros(len(first))), touched, rank)
        before = self._held.owners(touched)
        other = now != before
        self._held.own(touched[other], now[other])
        return Changed(ids=touched[other], before=before[other], now=now[other])


_NONE: Final[Ids] = np.empty(0, np.int64)
_NOTHING: Final = Changed(ids=_NONE, before=_NONE, now=_NONE)
