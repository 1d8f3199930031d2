"""A made-up log of clicks whose truth is known: ids by a power law, an effect for each id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.tasks.clicks.encoded import Encoded
from sparing.tasks.clicks.lookup import mix

_SMALLEST = 4


@final
@dataclass(frozen=True, kw_only=True)
class ZipfLog:
    """``rows`` rows of ``fields`` categorical fields with ``ids`` ids in all.

    Field sizes grow geometrically from 4 on. Within a field of n ids, id k is drawn with the
    probability ``(G(k + 2) - G(k + 1)) / (G(n + 1) - G(1))``, G the integral of ``x^-exponent``: a
    power law whose frequencies are known exactly. The click's log odds are ``bias``, plus the
    effects of its ids, plus the product of a pair of effects for each of ``pairs`` pairs of fields
    that stand side by side. An effect is drawn from N(0, strength^2 / fields) by a hash of field
    and id: it takes no memory, and a rare id tells as much as a frequent one.

    Rows are made in blocks of ``block``, each by seed and number alone, so that this is a source
    of ``Batches`` of any length that is never held as a whole.

    Raises RequestError for fewer ids than the smallest fields take.
    """

    rows: int
    fields: int = 26
    ids: int = 10_000_000
    exponent: float = 1.1
    strength: float = 2.0
    pairs: int = 8
    bias: float = -1.5
    block_rows: int = 1 << 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("rows", 1),
            ("fields", 1),
            ("block_rows", 1),
            ("seed", 0),
            ("pairs", 0),
        ):
            require_whole(name, getattr(self, name), least)
        require_whole("ids", self.ids, _SMALLEST * self.fields)
        require_number("exponent", self.exponent, 0)
        require_number("strength", self.strength, 0)
        if self.pairs > self.fields - 1:
            raise RequestError(f"{self.fields} fields have {self.fields - 1} pairs side by side")

    @property
    def field_sizes(self) -> tuple[int, ...]:
        """Ids of each field; together ``ids``."""
        low, high = 1.0, float(self.ids)
        steps = np.arange(self.fields)
        for _ in range(100):
            middle = (low * high) ** 0.5
            low, high = (
                (middle, high)
                if np.sum(_SMALLEST * np.minimum(middle**steps, self.ids)) < self.ids
                else (low, middle)
            )
        sizes = np.maximum(_SMALLEST * low**steps, _SMALLEST).astype(np.int64)
        sizes[-1] += self.ids - sizes.sum()
        return tuple(sizes.tolist())

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each block."""
        ends = np.append(np.arange(0, self.rows, self.block_rows), self.rows)
        return np.diff(ends)

    def frequencies(self, field: int) -> NDArray[np.float64]:
        """The probability of each id of a field, (n,), the most frequent first."""
        edges = self._integral(np.arange(1, self.field_sizes[field] + 2, dtype=np.float64))
        found: NDArray[np.float64] = np.diff(edges) / (edges[-1] - edges[0])
        return found

    def effects(self, field: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """The effect of each id of a field, (n,)."""
        keys = np.asarray(ids, dtype=np.int64) + np.int64(field << 40)
        # two uniform numbers of 32 bits, by Box and Muller a normal one
        hashes = mix(keys, self.seed + 1)
        first = ((hashes >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
        second = (hashes & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32
        normal = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
        found: NDArray[np.float64] = normal * (self.strength / self.fields**0.5)
        return found

    def odds(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """The true log odds of rows, (n, F) -> (n,)."""
        each = [self.effects(field, ids[:, field]) for field in range(self.fields)]
        total = np.full(len(ids), self.bias)
        for effect in each:
            total += effect
        for field in range(self.pairs):
            total += each[field] * each[field + 1]
        return total

    def block(self, number: int) -> Encoded:
        """The rows of a block; ``time`` is its number."""
        count = int(self.sizes[number])
        generator = np.random.default_rng([self.seed, number])
        ids = np.empty((count, self.fields), dtype=np.int32)
        for field, size in enumerate(self.field_sizes):
            ends = self._integral(np.array([1.0, size + 1.0]))
            drawn = self._inverse(ends[0] + (ends[1] - ends[0]) * generator.random(count))
            ids[:, field] = np.clip(drawn.astype(np.int64) - 1, 0, size - 1)
        probability = 1 / (1 + np.exp(-self.odds(ids.astype(np.int64))))
        labels = (generator.random(count) < probability).astype(np.uint8)
        return Encoded(
            ids,
            np.zeros((count, 0), dtype=np.float32),
            labels,
            np.full(count, number, dtype=np.int64),
            np.array([0, count]),
        )

    def _integral(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of x^-exponent."""
        rest = 1 - self.exponent
        return np.log(x) if abs(rest) < 1e-12 else x**rest / rest

    def _inverse(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        rest = 1 - self.exponent
        return np.exp(y) if abs(rest) < 1e-12 else (y * rest) ** (1 / rest)
