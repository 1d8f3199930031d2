"""Candidates ranked by their vectors, in float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparing.pool.neighbours import blocks
from sparing.pool.neighbours.packages import faiss
from sparing.pool.neighbours.protocol import NOBODY, Floats, Found, Ids

BLOCK = 1 << 12
"""Candidates whose vectors are fetched together: 4 MB of 256 entries, which caches hold."""
READ = 1 << 13
"""Stored vectors that are read together where every one is looked at."""
_LAST = (1 << 31) - 1


def best(distances: Floats, ids: Ids, k: int) -> Found:
    """The k nearest of candidates (q, c), the nearest first, equal ones by id."""
    _q, c = ids.shape
    if c < k:
        distances = np.pad(distances, ((0, 0), (0, k - c)), constant_values=np.inf)
        ids = np.pad(ids, ((0, 0), (0, k - c)), constant_values=NOBODY)
    if not ids.size or k == 0 or ids.min() < NOBODY or ids.max() >= _LAST:
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        return Found(np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1))
    # a distance is at least 0, so its bits rise with it: one whole number holds both, which sorts
    # ten times as fast
    far = np.ascontiguousarray(distances, dtype=np.float32).view(np.int32)
    both = (far.astype(np.int64) << 32) | (ids & _LAST)
    if k < ids.shape[1]:
        both = np.partition(both, k - 1, axis=1)[:, :k]
    both.sort(axis=1)
    names = both & _LAST
    names[names == _LAST] = NOBODY
    return Found((both >> 32).astype(np.int32).view(np.float32), names)


def of_places(queries: Floats, places: Ids, vectors: Tensor) -> Floats:
    """Distances (q, c) of the rows of ``vectors`` at these places, infinite for a place below 0.

    float32 vectors take half of the time of others.
    """
    nobody = places < 0
    known = np.ascontiguousarray(np.maximum(places, 0), dtype=np.int64)
    if vectors.dtype == torch.float32 and len(vectors):
        out = _products(queries, known, vectors)
    else:
        out = _far(queries, known.shape, lambda part: _picked(vectors, known[part]))
    out[nobody] = np.inf
    return out


def _products(queries: Floats, places: Ids, vectors: Tensor) -> Floats:
    """1 - products, each row read where it lies, without a copy of it."""
    f = faiss()
    held = vectors.numpy()
    out = np.empty(places.shape, dtype=np.float32)
    f.fvec_inner_products_by_idx(
        f.swig_ptr(out),
        f.swig_ptr(queries),
        f.swig_ptr(held),
        f.swig_ptr(places),
        held.shape[1],
        *places.shape,
    )
    np.subtract(1, out, out=out)
    return np.maximum(out, 0, out=out)


def of_read(queries: Floats, ids: Ids, read: Callable[[Ids], Floats]) -> Floats:
    """Distances (q, c) of candidates by the vectors that ``read`` gives."""
    some = ids.max(initial=NOBODY) if ids.size else NOBODY
    if some == NOBODY:
        return np.full(ids.shape, np.inf, dtype=np.float32)
    # any id that is stored, in the place of none
    named = np.where(ids == NOBODY, some, ids)

    def fetched(part: slice) -> Tensor:
        each, back = np.unique(named[part], return_inverse=True)
        return torch.from_numpy(read(each))[torch.from_numpy(back.reshape(-1))]

    out = _far(queries, ids.shape, fetched)
    out[ids == NOBODY] = np.inf
    return out


def all_of(queries: Floats, ids: Ids, read: Callable[[Ids], Floats], c: int) -> tuple[Floats, Ids]:
    """The c nearest of all ids, (q, min(c, n)), each vector read once."""
    rows = torch.from_numpy(queries)
    nearest: list[Floats] = []
    names: list[Ids] = []
    for start in range(0, len(ids), READ):
        part = ids[start : start + READ]
        held = torch.from_numpy(np.ascontiguousarray(read(part), dtype=np.float32))
        found = blocks.search(rows, held, min(c, len(part)))
        nearest.append((1 - found.values).clamp_(min=0).numpy())
        names.append(part[found.columns.numpy()])
        if len(names) > 1:
            kept = best(np.concatenate(nearest, 1), np.concatenate(names, 1), c)
            nearest, names = [kept.distances], [kept.ids]
    if not names:
        return np.empty((len(queries), 0), dtype=np.float32), np.empty((len(queries), 0), "i8")
    return nearest[0], names[0]


def _picked(vectors: Tensor, places: Ids) -> Tensor:
    return vectors.index_select(0, torch.from_numpy(places.reshape(-1))).float()


def _far(queries: Floats, shape: tuple[int, ...], fetched: Callable[[slice], Tensor]) -> Floats:
    q, c = shape
    out = np.full((q, c), np.inf, dtype=np.float32)
    rows = torch.from_numpy(queries)
    step = max(1, BLOCK // max(c, 1))
    for start in range(0, q if c else 0, step):
        part = slice(start, min(q, start + step))
        held = fetched(part).view(part.stop - start, c, -1)
        found = torch.bmm(held, rows[part].unsqueeze(2)).squeeze(2)
        out[part] = (1 - found).clamp_(min=0).numpy()
    return out
