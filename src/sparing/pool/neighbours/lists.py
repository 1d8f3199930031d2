"""Inverted lists over product codes, by FAISS: where the nearest of a row may be found.

A vector is in the list of its nearest centroid, as 4-bit codes of what it differs by from it. A
list that grows past its limit is split in two by its own vectors, so that lists follow the data
while it grows, each split looks at one list, and nothing is ever trained on everything again. Items
of a list that is split may go to a list beside it: else those of one place drift apart over splits,
and finding them needs twice as many lists.

Jegou, Douze, Schmid 2011 (inverted lists over codes of residuals); Andre, Kermarrec, Le Scouarnec
2015 (4-bit codes in registers); splitting as by Xu et al. 2023 (SPFresh). See github.com/
facebookresearch/faiss for what does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.neighbours.packages import faiss
from sparing.pool.neighbours.protocol import Floats, Ids

CODES = 128
"""The most 4-bit codes a vector."""
ROOM = 1 << 16
"""Lists that there can be; past it lists only grow longer."""
TRAINED_ON = 32_768
STEPS = 10
BESIDE = 32
"""Lists around one that is split into which its items may go."""


@final
class Lists:
    """Codes of vectors under their ids.

    limit: items past which a list is split. ``centroids`` are (lists, d) float32 of length 1.
    """

    def __init__(self, dim: int, limit: int, seed: int) -> None:
        self.dim, self.limit, self.seed = dim, limit, seed
        codes = min(-(-dim // 8) * 2, CODES)
        self.wide = -(-dim // codes) * codes  # vectors are filled up with zeros to this
        self.codes = codes
        self.centroids: Floats = np.empty((0, dim), dtype=np.float32)
        self._stuck: dict[int, int] = {}  # lists of copies, and how long they were
        self._index: Any = None

    def __len__(self) -> int:
        return int(self._index.ntotal) if self._index is not None else 0

    def train(self, sample: Floats) -> None:
        """Lay out lists of half their limit and learn the codes. sample: (n, d), n at least 1."""
        f = faiss()
        sample = self._filled(sample[-TRAINED_ON:])
        count = max(1, 2 * len(sample) // self.limit)
        means = f.Kmeans(
            self.wide,
            count,
            niter=STEPS,
            spherical=True,
            seed=self.seed,
            min_points_per_centroid=1,
            max_points_per_centroid=len(sample),
        )
        means.train(sample)
        quantizer = f.IndexFlatIP(self.wide)
        index = f.IndexIVFPQFastScan(
            quantizer, self.wide, ROOM, self.codes, 4, f.METRIC_INNER_PRODUCT
        )
        index.by_residual = True
        self._index, self._quantizer = index, quantizer
        self._set(_unit(means.centroids.reshape(count, self.wide)))
        nearest = quantizer.search(sample, 1)[1][:, 0]
        index.pq.cp.seed = self.seed
        index.pq.cp.min_points_per_centroid = 1
        residuals = sample - self.centroids_wide()[nearest]
        if len(residuals) < 16:
            residuals = np.resize(residuals, (16, self.wide))
        index.pq.train(np.ascontiguousarray(residuals))
        index.is_trained = True

    def add(self, ids: Ids, vectors: Floats) -> None:
        """Ids that are not there, and their vectors (n, d)."""
        if len(ids):
            faiss()
            self._index.add_with_ids(self._filled(vectors), np.ascontiguousarray(ids))

    def remove(self, ids: Ids) -> None:
        """Take these out; the cost is a look at every id."""
        if len(ids):
            self._index.remove_ids(np.ascontiguousarray(ids))

    def candidates(self, queries: Floats, count: int, probes: int) -> Ids:
        """(q, count) ids in no order that matters, -1 where there are fewer."""
        faiss()
        self._index.nprobe = min(probes, len(self.centroids))
        found: Ids = self._index.search(self._filled(queries), count)[1]
        return found

    def lengths(self) -> Ids:
        """(lists,) how many items each list has."""
        inverted = self._index.invlists
        count = range(len(self.centroids))
        return np.fromiter((inverted.list_size(i) for i in count), np.int64, len(count))

    def split(self, read: Callable[[Ids], Floats], most: int) -> int:
        """Split the longest lists past the limit, at most so many; returns how many more wait."""
        lengths = self.lengths()
        limits = np.full(len(lengths), self.limit)
        for number, length in self._stuck.items():
            limits[number] = 2 * length
        over = np.flatnonzero(lengths > limits)
        room = ROOM - len(self.centroids)
        chosen = over[np.argsort(-lengths[over], kind="stable")][: min(most, room)]
        if not len(chosen):
            return 0
        f, inverted = faiss(), self._index.invlists
        changed, fresh, rows, names = [], [], [], []
        for number in chosen.tolist():
            ids = f.rev_swig_ptr(inverted.get_ids(number), int(lengths[number])).copy()
            vectors = read(ids)
            halves = two_means(vectors)
            if halves is None:
                self._stuck[number] = len(ids)
                continue
            self._stuck.pop(number, None)
            changed.append(number)
            fresh.append(halves)
            rows.append(vectors)
            names.append(ids)
        if changed:
            self._refill(np.array(changed), np.stack(fresh), np.concatenate(rows), names)
        return len(over) - len(chosen)

    def _refill(self, changed: Ids, fresh: Floats, vectors: Floats, names: list[Ids]) -> None:
        """Empty these lists and put their vectors into the nearest of the new ones."""
        f, index = faiss(), self._index
        for number in changed.tolist():
            index.invlists.resize(number, 0)
        index.ntotal -= len(vectors)
        added = np.arange(len(self.centroids), len(self.centroids) + len(changed))
        centroids = np.concatenate([self.centroids, fresh[:, 1]])
        centroids[changed] = fresh[:, 0]
        self._set(self._filled(centroids))
        # they go to the new centroids, or to one beside them
        few = f.IndexIDMap2(f.IndexFlatIP(self.wide))
        beside = self._quantizer.search(self._filled(fresh.reshape(-1, self.dim)), BESIDE)[1]
        numbers = np.unique(np.concatenate([changed, added, beside[beside >= 0]]))
        few.add_with_ids(self._filled(centroids[numbers]), numbers)
        index.quantizer = few
        try:
            index.add_with_ids(self._filled(vectors), np.concatenate(names))
        finally:
            index.quantizer = self._quantizer

    def _set(self, wide: Floats) -> None:
        self._quantizer.reset()
        self._quantizer.add(wide)
        self.centroids = np.ascontiguousarray(wide[:, : self.dim])

    def centroids_wide(self) -> Floats:
        """(lists, d) filled up with zeros."""
        return self._filled(self.centroids)

    def _filled(self, vectors: Floats) -> Floats:
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if self.wide == self.dim:
            return vectors
        return np.pad(vectors, ((0, 0), (0, self.wide - self.dim)))

    def state(self) -> dict[str, Any]:
        """Codes as bytes, and what stands beside them."""
        held: NDArray[np.uint8] = faiss().serialize_index(self._index)
        return {"codes": held, "stuck": [list(pair) for pair in self._stuck.items()]}

    def ids(self) -> Ids:
        """(n,) all that are in lists, by list."""
        f, inverted = faiss(), self._index.invlists
        held = [
            f.rev_swig_ptr(inverted.get_ids(number), length)
            for number, length in enumerate(self.lengths().tolist())
            if length
        ]
        return np.concatenate(held) if held else np.empty(0, dtype=np.int64)

    def restore(self, codes: NDArray[np.uint8], stuck: list[list[int]]) -> None:
        """Take over what ``state`` gave. Raises RequestError for lists of other sizes."""
        f = faiss()
        index = f.deserialize_index(codes)
        if (index.d, index.pq.M) != (self.wide, self.codes):
            raise RequestError(
                f"these lists hold {index.pq.M} codes of {index.d} entries, and {self.codes} of "
                f"{self.wide} are expected; build the index anew"
            )
        self._index = index
        self._quantizer = f.downcast_index(index.quantizer)
        count = self._quantizer.ntotal
        wide = self._quantizer.reconstruct_n(0, count).reshape(count, self.wide)
        self.centroids = np.ascontiguousarray(wide[:, : self.dim])
        self._stuck = {int(number): int(length) for number, length in stuck}


def two_means(vectors: Floats, steps: int = 4) -> Floats | None:
    """Two centroids of length 1, (2, d), of vectors (n, d); None if they cannot be told apart.

    Neither gets less than an eighth of the vectors: else they are cut at the median along the
    direction in which they vary most.
    """
    centred = vectors - vectors.mean(0)
    far = int(np.argmax(np.einsum("nd,nd->n", centred, centred)))
    axis = centred[far]
    for _ in range(3):
        length = float(np.linalg.norm(axis))
        if length < 1e-6:
            return None
        axis = centred.T @ (centred @ (axis / length))
    along = centred @ axis
    cut = upper = along > np.median(along)
    for _ in range(steps):
        if not upper.any() or upper.all():
            break
        pair = _unit(np.stack([vectors[~upper].mean(0), vectors[upper].mean(0)]))
        upper = vectors @ (pair[1] - pair[0]) > 0
    if min(upper.sum(), (~upper).sum()) < len(vectors) / 8:
        upper = cut
    if not upper.any() or upper.all():
        return None
    return _unit(np.stack([vectors[~upper].mean(0), vectors[upper].mean(0)]))


def _unit(rows: Floats) -> Floats:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.maximum(length, 1e-12), dtype=np.float32)
