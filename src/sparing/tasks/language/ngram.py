"""An n-gram model of bytes: interpolated modified Kneser-Ney, counted by sorting packed integers.

Source: Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling"
(TR-10-98, 1998), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Keys = NDArray[np.uint64]
Reals = NDArray[np.float64]

_BYTE = np.uint64(8)
_LEAST_DISCOUNT = 0.05


@final
@dataclass(frozen=True, slots=True)
class _Level:
    """One order's table. A key holds a gram's bytes, the latest lowest; key >> 8 is its context."""

    grams: Keys  # (G,), sorted
    kept: Reals  # (G,), count less discount
    contexts: Keys  # (C,), sorted
    totals: Reals  # (C,), counts of all grams of the context
    discounts: Reals  # (C,), what was taken off them


def _keys(text: Bytes, ends: Integers, order: int) -> Keys:
    """The packed n-grams whose last bytes stand at ``ends`` (all at least ``order - 1``)."""
    keys = np.zeros(len(ends), dtype=np.uint64)
    for back in range(order - 1, -1, -1):
        keys = (keys << _BYTE) | text[ends - back].astype(np.uint64)
    return keys


def _discounts(counts: Integers) -> Reals:
    """D of counts 0, 1, 2, 3 and more (equation 26), kept inside (0, count).

    A table too small to have grams that occur once and grams that occur twice takes half.
    """
    n1, n2, n3, n4 = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    if not (n1 and n2):
        return np.array([0.0, 0.5, 1.0, 1.5])
    y = n1 / (n1 + 2 * n2)
    raw = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3 if n3 else 1.5]
    return np.array(
        [0.0]
        + [min(max(raw[times], _LEAST_DISCOUNT), times - _LEAST_DISCOUNT) for times in (1, 2, 3)]
    )


def _level(grams: Keys, counts: Integers) -> _Level:
    taken = _discounts(counts)[np.minimum(counts, 3)]
    contexts, first = np.unique(grams >> _BYTE, return_index=True)
    return _Level(
        grams=grams,
        kept=counts - taken,
        contexts=contexts,
        totals=np.add.reduceat(counts, first).astype(np.float64),
        discounts=np.add.reduceat(taken, first),
    )


def _find(table: Keys, wanted: Keys) -> tuple[Integers, NDArray[np.bool_]]:
    """Where ``wanted`` would stand in the sorted ``table``, and whether it is there."""
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return place, table[place] == wanted


@final
class NGram:
    """Bits per byte of an interpolated n-gram model, ``order`` from 1 to 8.

    ``parts``: pairs of a text, (n,) uint8, and the sorted positions in it that may be learnt
    from, (m,) int64; a gram counts if all its bytes are among them.
    Raises RequestError for an order out of range and if no gram fits.
    """

    def __init__(self, order: int, parts: Iterable[tuple[Bytes, Integers]]) -> None:
        if not 1 <= order <= 8:
            raise RequestError(f"order must be between 1 and 8, got {order}")
        given = list(parts)
        self.order = order
        self._levels: list[_Level] = []
        longer: Keys | None = None
        for n in range(order, 0, -1):
            grams, counts = np.unique(
                np.concatenate([_keys(text, _ends(at, n), n) for text, at in given]),
                return_counts=True,
            )
            if not len(grams):
                raise RequestError(f"the text is too short for an n-gram model of order {order}")
            if longer is not None:
                # Below the highest order a gram counts once for each byte that may precede it.
                lowest = np.uint64((1 << (8 * n)) - 1)
                self._levels.append(_level(*np.unique(longer & lowest, return_counts=True)))
            else:
                self._levels.append(_level(grams, counts))
            longer = grams
        self._levels.reverse()

    def bits(self, text: Bytes, positions: Integers) -> Reals:
        """-log2 of the chance of each byte of ``text`` at ``positions``, given those before it.

        Text before the position serves as context even if it is not at a position itself.
        """
        chance = np.full(len(positions), 1 / 256)
        for n, level in enumerate(self._levels, start=1):
            whole = positions >= n - 1
            keys = _keys(text, positions[whole], n)
            gram, seen = _find(level.grams, keys)
            context, known = _find(level.contexts, keys >> _BYTE)
            own = np.where(seen, level.kept[gram], 0.0)
            lower = chance[whole]
            mixed = (own + level.discounts[context] * lower) / level.totals[context]
            chance[whole] = np.where(known, mixed, lower)
        bits: Reals = -np.log2(chance)
        return bits


def _ends(at: Integers, order: int) -> Integers:
    """The positions of ``at`` that end a gram all of whose bytes are in ``at``."""
    ends = at[order - 1 :]
    whole: Integers = ends[ends - at[: len(ends)] == order - 1]
    return whole
