"""Streams of vectors of length 1: drawn clusters, or embeddings of real texts with jitter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DIM, CLUSTERS, BATCH = 256, 5000, 1000
WIDTH = 0.65
JITTER = 0.3
"""Length of the noise on a vector of length 1 that was given before: a cosine of .96 with it."""
Rows = NDArray[np.float32]


class Stream:
    """Vectors in batches, the same again for the same seed.

    path: embeddings, .npy of (n, d), given in a random order; once all were given they come again,
    each time with other noise. Without it ``CLUSTERS`` clusters, ``width`` times as wide as they
    are apart.
    """

    def __init__(self, path: Path | None, seed: int, width: float = WIDTH) -> None:
        self.random = np.random.Generator(np.random.SFC64(seed))
        self.real, self.width, self.given = path is not None, width, 0
        self.base: Rows = (
            self.random.standard_normal((CLUSTERS, DIM), dtype=np.float32)
            if path is None
            else np.load(path, mmap_mode="r")
        )
        self.order = self.random.permutation(len(self.base))

    def take(self, n: int) -> Rows:
        if self.real:
            at = np.arange(self.given, self.given + n)
            rows = unit(np.asarray(self.base[self.order[at % len(self.base)]], dtype=np.float32))
            again = at >= len(self.base)
            if again.any():
                noise = self.random.standard_normal(rows.shape, dtype=np.float32)
                rows += np.float32(JITTER / np.sqrt(rows.shape[1])) * noise * again[:, None]
            self.given += n
        else:
            rows = self.base[self.random.integers(len(self.base), size=n)]
            noise = self.random.standard_normal(rows.shape, dtype=np.float32)
            rows = rows + np.float32(self.width) * noise
        return unit(rows)

    def batches(self, n: int) -> Iterator[Rows]:
        for start in range(0, n, BATCH):
            yield self.take(min(BATCH, n - start))


def unit(rows: Rows) -> Rows:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
