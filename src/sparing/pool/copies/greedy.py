"""Near copies found from the vectors themselves: exact, without a list of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number, require_whole
from sparing.pool.copies.groups import Ids, independent

BLOCK: Final = 256


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """When two items are near copies.

    limit: cosine distance at most. bits: or, where both items have perceptual hashes, so many of 64
    bits differ at most; -1 lets the distance alone decide.
    """

    limit: float
    bits: int = -1

    def __post_init__(self) -> None:
        require_number("limit", self.limit, 0.0, 2.0)
        require_whole("bits", self.bits, -1)

    def table(self, one: Traits, two: Traits) -> NDArray[np.bool_]:
        """(n, m) which of ``one`` (n items) and ``two`` (m items) are near copies."""
        cosine = one.vectors @ two.vectors.T
        found: NDArray[np.bool_] = cosine >= np.float32(1 - self.limit)
        if self.bits < 0 or one.marks is None or two.marks is None:
            return found
        mine, theirs = np.flatnonzero(one.marks), np.flatnonzero(two.marks)
        if mine.size and theirs.size:
            apart = np.bitwise_count(one.marks[mine, None] ^ two.marks[None, theirs])
            found[np.ix_(mine, theirs)] |= apart <= self.bits
        return found


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What is compared: vectors (n, d) of length 1, and perceptual hashes (n,), 0 for none."""

    vectors: NDArray[np.float32]
    marks: NDArray[np.uint64] | None = None

    def at(self, rows: Ids) -> Traits:
        """Those of some rows."""
        marks = None if self.marks is None else self.marks[rows]
        return Traits(vectors=self.vectors[rows], marks=marks)


def owners(traits: Traits, rank: Ids, near: Near) -> Ids:
    """(n,) the row of each item's representative, by the rule of ``copies.representatives``.

    Items are taken best first, BLOCK at a time, and compared with the representatives before them:
    n r products of vectors for r representatives, so a mass of copies costs little.
    """
    size = len(rank)
    order = np.argsort(rank, kind="stable")
    owner = np.arange(size, dtype=np.int64)
    kept: list[Ids] = []
    for at in range(0, size, BLOCK):
        rows = order[at : at + BLOCK]
        free = np.ones(len(rows), bool)
        mine = traits.at(rows)
        for part in kept:  # each of up to 4 BLOCK representatives, best first
            hit = near.table(mine, traits.at(part))
            taken = free & hit.any(1)
            owner[rows[taken]] = part[hit[taken].argmax(1)]
            free &= ~taken
            if not free.any():
                break
        rows = rows[free]
        if not len(rows):
            continue
        beside = near.table(traits.at(rows), traits.at(rows))
        one, two = np.nonzero(np.triu(beside, 1))
        chosen = independent(one, two, np.arange(len(rows)))
        first = (beside & chosen).argmax(1)
        owner[rows] = np.where(chosen, rows, rows[first])
        if kept and len(kept[-1]) < 4 * BLOCK:
            kept[-1] = np.concatenate([kept[-1], rows[chosen]])
        else:
            kept.append(rows[chosen])
    return owner
