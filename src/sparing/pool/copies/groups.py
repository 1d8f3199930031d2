"""Groups of near duplicates, one representative each, whatever order the items arrived in.

An item is a representative unless a better one that is itself a representative lies within the
limit: the greedy choice in the order of quality, which depends on the pairs alone. So each member
is within the limit of its representative, and a long drift a ~ b ~ c ~ ... is cut where it leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number
from sparing.core.errors import RequestError

Ids = NDArray[np.int64]
_LIMIT: Final = 2.0
"""The largest cosine distance that there is."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Two items each that are near copies: ids (p,) with first < second, and their distance."""

    first: Ids
    second: Ids
    distance: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.first)


def pairs(first: Any, second: Any, distance: Any, limit: float = _LIMIT) -> Pairs:
    """The pairs closer than or at ``limit``, each once, in order; an item with itself is none."""
    require_number("limit", limit, 0.0, _LIMIT)
    one, two = np.asarray(first, np.int64), np.asarray(second, np.int64)
    length = np.asarray(distance, np.float32)
    if not one.shape == two.shape == length.shape or one.ndim != 1:
        raise RequestError(
            f"pairs need three arrays of one length, got {one.shape}, {two.shape}, {length.shape}"
        )
    near = (length <= limit) & (one != two) & (one >= 0) & (two >= 0)
    low, high = np.minimum(one, two)[near], np.maximum(one, two)[near]
    order = np.lexsort((length[near], high, low))
    low, high, length = low[order], high[order], length[near][order]
    once = np.ones(len(low), bool)
    once[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return Pairs(first=low[once], second=high[once], distance=length[once])


def pairs_of_lists(
    ids: Ids, distances: NDArray[np.floating[Any]], neighbours: Ids, limit: float
) -> Pairs:
    """The pairs that neighbour lists hold: ids (n,), distances and neighbours (n, k), -1 for none.

    A list that is full within the limit may have missed some: see ``sparing.pool.copies_complete``.
    """
    found = np.asarray(neighbours, np.int64)
    if found.shape != np.shape(distances) or found.ndim != 2 or len(found) != len(ids):
        raise RequestError(
            f"neighbour lists of {len(ids)} items need two arrays ({len(ids)}, k), got "
            f"{np.shape(distances)} and {found.shape}"
        )
    # a missing one has distance infinity, a distance of copies may be slightly below 0
    near = np.nonzero((found >= 0) & (np.asarray(distances) <= limit))
    rows = np.asarray(ids, np.int64)[near[0]]
    return pairs(rows, found[near], np.asarray(distances)[near], limit)


def ranks(quality: Any, hashes: Any) -> Ids:
    """(n,) 0 for the best: highest quality first, ties by content hash, lowest first.

    quality: (n,), or (n, q) where the first of q counts most; hashes: (n,) numbers or bytes, or
    (n, w) of numbers, likewise.
    """
    held = np.asarray(hashes)
    value = np.asarray(quality, np.float64)
    if value.ndim not in (1, 2) or len(held) != len(value):
        raise RequestError(f"{len(value)} qualities and {len(held)} hashes; expected one an item")
    if np.isnan(value).any():
        raise RequestError("a quality is NaN; give each item a number, the higher the better")
    order = np.lexsort((*_keys(held), *_keys(-value)))
    rank = np.empty(len(value), np.int64)
    rank[order] = np.arange(len(value))
    return rank


def _keys(values: NDArray[Any]) -> list[NDArray[Any]]:
    """As lexsort wants them, the most significant last."""
    return [values] if values.ndim == 1 else [*values.T[::-1]]


def representatives(found: Pairs, ids: Ids, rank: Ids) -> Ids:
    """(n,) for each of ``ids`` (n,) its representative's id, its own where it stands for itself.

    rank (n,): ``ranks`` of the same items; an item that several representatives lie near belongs to
    the best of them. Raises RequestError for a pair whose ids are not among ``ids``.

    The greedy independent set in the order of rank, in parallel rounds (Blelloch, Fineman, Shun
    2012): as many rounds as the longest chain of ever worse items, a few but for long drifts.
    """
    given = np.asarray(ids, np.int64)
    if not len(found):
        return given.copy()
    order = np.argsort(given, kind="stable")
    ends = []
    for side in (found.first, found.second):
        place = np.minimum(np.searchsorted(given[order], side), len(given) - 1)
        if not len(given) or (given[order[place]] != side).any():
            raise RequestError("a pair names an item that is not among those to be grouped")
        ends.append(order[place])
    rank = np.asarray(rank, np.int64)
    chosen = independent(ends[0], ends[1], rank)
    # an item belongs to the best representative beside it
    owner = np.where(chosen, rank, len(given))
    for here, there in (ends, ends[::-1]):
        takes = chosen[here] & ~chosen[there]
        np.minimum.at(owner, there[takes], rank[here[takes]])
    by_rank = np.empty(len(given), np.int64)
    by_rank[rank] = given
    made: Ids = by_rank[owner]
    return made


def independent(one: Ids, two: Ids, rank: Ids) -> NDArray[np.bool_]:
    """(n,) which items are representatives, of edges between positions ``one`` and ``two`` (p,)."""
    swap = rank[one] > rank[two]
    better, worse = np.where(swap, two, one), np.where(swap, one, two)
    chosen = np.ones(len(rank), bool)
    waiting = np.zeros(len(rank), bool)
    while len(better):
        waiting[worse] = True
        wins = ~waiting[better]
        lost = worse[wins]
        waiting[worse] = False
        chosen[lost] = False
        # an edge is settled once its better end has won or either end has lost
        open_ = ~wins & chosen[better] & chosen[worse]
        better, worse = better[open_], worse[open_]
    return chosen
