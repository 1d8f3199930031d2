"""Positions of values in a fixed set, for millions of values at a time; hashes of texts.

Everything here works on whole arrays. Arithmetic is modulo 2^64, so that results do not depend on
the machine.
"""

from __future__ import annotations

from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

_DENSE: Final = 1 << 20
"""A span of values up to this gets a table of its own, even if most of it stays empty."""
_BASE: Final = np.uint64(0x9E3779B97F4A7C15)
_ROUND: Final = 1 << 20
"""Values looked up at a time: what belongs to them then stays in the processor's caches."""


@final
class Lookup:
    """Where a value stands among ``keys``, (n,) distinct int64.

    A table over the span of the keys where that is at most four times their number (or small),
    otherwise open addressing with linear probing.
    """

    def __init__(self, keys: Ints) -> None:
        self._keys = np.ascontiguousarray(keys, dtype=np.int64)
        count = len(keys)
        self._low = np.int64(self._keys.min()) if count else np.int64(0)
        span = int(self._keys.max()) - int(self._low) + 1 if count else 0
        self._dense = span <= max(_DENSE, 4 * count)
        if self._dense:
            # one more entry, to which everything outside the span is sent
            self._table = np.full(span + 1, -1, dtype=np.int32)
            self._table[self._keys - self._low] = np.arange(count, dtype=np.int32)
        else:
            self._table = np.full(1 << int(1.5 * count).bit_length(), -1, dtype=np.int32)
            self._insert()

    def find(self, values: Ints) -> NDArray[np.int32]:
        """Positions in ``keys``, (m,) int64 -> (m,) int32; -1 for values that are not there."""
        if len(values) <= _ROUND:
            return self._some(values)
        found = np.empty(len(values), dtype=np.int32)
        for start in range(0, len(values), _ROUND):
            found[start : start + _ROUND] = self._some(values[start : start + _ROUND])
        return found

    def _some(self, values: Ints) -> NDArray[np.int32]:
        if self._dense:
            # as unsigned numbers, values below the lowest key are far above the highest
            far = np.subtract(values, self._low, dtype=np.int64).view(np.uint64)
            np.minimum(far, np.uint64(len(self._table) - 1), out=far)
            return self._table.take(far.view(np.int64))
        slot = self._slot(values)
        found = self._table.take(slot)
        pending = np.flatnonzero((found >= 0) & (self._keys.take(found) != values))
        while len(pending):
            slot[pending] = (slot[pending] + 1) & (len(self._table) - 1)
            here = self._table[slot[pending]]
            found[pending] = here
            pending = pending[(here >= 0) & (self._keys[here] != values[pending])]
        return found

    def _slot(self, values: Ints) -> Ints:
        return (mix(values) & np.uint64(len(self._table) - 1)).view(np.int64)

    def _insert(self) -> None:
        slot = self._slot(self._keys)
        pending = np.arange(len(self._keys))
        while len(pending):
            free = self._table[slot[pending]] < 0
            taking = pending[free]
            self._table[slot[taking]] = taking.astype(np.int32)
            # of several that take one slot the last has it; the others go on to the next
            pending = pending[self._table[slot[pending]] != pending]
            slot[pending] = (slot[pending] + 1) & (len(self._table) - 1)


def mix(values: NDArray[Any], salt: int = 0) -> Hashes:
    """Scatter 64-bit values, (n,) -> (n,) uint64, one to one: the finaliser of SplitMix64.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = values.astype(np.uint64) if values.dtype != np.int64 else values.view(np.uint64).copy()
    x += np.uint64((int(_BASE) * (salt + 1)) % 2**64)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def text_hashes(content: NDArray[np.uint8], offsets: Ints, salt: int = 0) -> Hashes:
    """Hashes of n byte strings, (n,) uint64: ``content[offsets[i]:offsets[i + 1]]`` each.

    A polynomial in an odd base modulo 2^64, mixed with the length. ``salt`` chooses another base.
    """
    lengths = np.diff(offsets)
    used = content[offsets[0] : offsets[-1]].astype(np.uint64) if len(lengths) else content[:0]
    place = np.arange(len(used)) - np.repeat(offsets[:-1] - offsets[0], lengths)
    base = mix(np.array([salt], dtype=np.int64))[0] | np.uint64(1)
    longest = int(lengths.max()) if len(lengths) else 0
    powers = np.full(longest + 1, base, dtype=np.uint64)
    powers[0] = 1
    powers = np.multiply.accumulate(powers)
    terms = (used + np.uint64(1)) * powers[place]
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.add.accumulate(terms)])
    bounds = offsets - offsets[0]
    whole = sums[bounds[1:]] - sums[bounds[:-1]]
    return mix(whole + lengths.astype(np.uint64) * _BASE)
