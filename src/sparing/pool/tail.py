"""What is beyond the neighbours that are kept, told from the farthest of them.

Of k = 4 and M = 10 kept neighbours a weight of 0.23 lies beyond the tenth. Its mean distance is
learnt from a random sample of items whose distances to all others were computed: the mean of the
exact tail among items with about the same M-th distance. Were the M-th distance itself taken, a
group of more than M copies would add nothing at all, where it should add as much as any item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.gain import MISSING, Floats, remainder

PROBES: Final = 384
"""Items whose distances to all others are computed."""
BINS: Final = 24
"""Of about equally many probes each."""
FINE: Final = 4096
"""Into so many bins the distances 0..2 are counted."""


@final
@dataclass(frozen=True, slots=True)
class Tail:
    """The mean distance beyond the M-th neighbour by its distance: both (b,) float64, ascending."""

    last: NDArray[np.float64]
    beyond: NDArray[np.float64]

    def __call__(self, last: Floats) -> NDArray[np.float64]:
        """The M-th distances (n,) to the mean distances beyond them (n,), never below them."""
        wide = np.asarray(last, dtype=np.float64)
        return np.maximum(np.interp(wide, self.last, self.beyond), wide)

    @staticmethod
    def fit(last: Floats, beyond: Floats) -> Tail:
        """Means of neighbouring probes: (p,) and (p,), in any order."""
        if last.shape != beyond.shape or not last.size:
            raise RequestError("a tail is fitted to as many distances as means, at least one")
        order = np.argsort(last, kind="stable")
        parts = np.array_split(order, min(BINS, order.size))
        x = np.array([last[part].mean(dtype=np.float64) for part in parts])
        y = np.array([beyond[part].mean(dtype=np.float64) for part in parts])
        at, where = np.unique(x, return_inverse=True)  # copies: many with the very same distance
        held = np.bincount(where, weights=[part.size for part in parts])
        total = np.bincount(where, weights=y * [part.size for part in parts])
        return Tail(at, total / held)


@final
class Profile:
    """How many items are at which distance of some probes, (p, d), block by block of all items."""

    def __init__(self, probes: NDArray[np.float32]) -> None:
        self._probes = probes
        self._counts = np.zeros(len(probes) * FINE, dtype=np.int64)
        self._first = (np.arange(len(probes)) * FINE)[:, None].astype(np.int32)

    def add_(self, vectors: NDArray[np.float32]) -> None:
        """Count the distances to more items, (n, d); the probes themselves are among them once."""
        near = self._probes @ vectors.T
        where = ((1 - near) * np.float32(FINE / 2)).astype(np.int32)
        np.clip(where, 0, FINE - 1, out=where)
        where += self._first
        self._counts += np.bincount(where.ravel(), minlength=self._counts.size)

    def beyond(self, listed: int, k: int) -> NDArray[np.float64]:
        """The mean distance beyond the first ``listed`` >= k neighbours, by their weights: (p,).

        Weights (k+1) / (2 m (m+1)) sum over ranks a+1..b to (k+1)/2 (1/(a+1) - 1/(b+1)), so that
        counts are enough. That nothing came before, which counts 1, belongs to it.
        """
        counts = self._counts.reshape(-1, FINE).copy()
        counts[:, 0] -= 1  # itself
        last = np.cumsum(counts, axis=1)
        others = last[:, -1:].astype(np.float64)
        if listed < k or (others <= listed).any():
            raise RequestError(f"{listed} listed of {int(others.min())} others leave no tail")
        up_to = np.maximum(last, listed).astype(np.float64)
        before = np.concatenate([np.full((len(counts), 1), float(listed)), up_to[:, :-1]], 1)
        share = 1 / (before + 1) - 1 / (up_to + 1)
        middle = (np.arange(FINE) + 0.5) * (2 / FINE)
        total = share @ middle + MISSING / (others[:, 0] + 1)
        found: NDArray[np.float64] = total * (k + 1) / 2 / remainder(listed, k)
        return found
