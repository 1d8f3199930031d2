"""How good an index is: stored vectors must find themselves and their true neighbours."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from sparing.core.checks import require_whole
from sparing.pool.neighbours import ranking
from sparing.pool.neighbours.protocol import Neighbours

TOLERANCE = 1e-3


class Recall(NamedTuple):
    """itself: the share of the sample that find themselves; near: of their true neighbours.

    A neighbour counts that is not further off than the true k-th by more than the tolerance.
    """

    itself: float
    near: float
    sample: int


@final
class Probe:
    """A random sample of what is stored, drawn from ``seed`` and the size, and its true neighbours.

    Making it takes ``sample`` products with everything; asking it costs a query.
    """

    def __init__(
        self, index: Neighbours, *, k: int, sample: int, seed: int, tolerance: float = TOLERANCE
    ) -> None:
        require_whole("k", k, 1)
        require_whole("sample", sample, 1)
        self.index, self.tolerance = index, tolerance
        ids = index.ids()
        random = np.random.Generator(np.random.SFC64((seed, len(ids))))
        self._some = np.sort(random.choice(ids, min(sample, len(ids)), replace=False))
        self._others = min(k, len(ids) - 1)
        if self._others < 1:
            return
        rows = index.vectors(self._some)
        # in float16 lengths are off by more than a check of lengths allows where entries are few
        self._rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        far, names = ranking.all_of(self._rows, ids, index.vectors, self._others + 1)
        self._limit = ranking.best(far, names, self._others + 1).distances[:, -1:] + tolerance

    def recall(self) -> Recall:
        """How the index does as it is now; it must hold what it held when this was made."""
        k, some = self._others, self._some
        if k < 1:
            return Recall(1.0, 1.0, len(some))
        found = self.index.query(self._rows, k + 1)
        # where its content is stored more than once an item may find a copy: distance counts
        itself = (found.ids == some[:, None]).any(1) | (found.distances[:, 0] <= self.tolerance)
        hits = (found.distances <= self._limit).sum(1)
        near = np.clip((hits - itself) / k, 0, 1)
        return Recall(float(itself.mean()), float(near.mean()), len(some))


def probe(index: Neighbours, *, k: int = 4, sample: int = 256, seed: int = 0) -> Recall:
    """Look for a random sample of what is stored, and compare with every stored vector."""
    return Probe(index, k=k, sample=sample, seed=seed).recall()
