"""Candidates ranked by their vectors, in float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparing.pool.neighbours import blocks
from sparing.pool.neighbours.protocol import NOBODY, Floats, Found, Ids

BLOCK = 1 << 15
"""Candidates whose vectors are fetched together: 32 MB of 256 entries."""
READ = 1 << 13
"""Stored vectors that are read together where every one is looked at."""


def best(distances: Floats, ids: Ids, k: int) -> Found:
    """The k nearest of candidates (q, c), the nearest first, equal ones by id."""
    _q, c = ids.shape
    if c < k:
        distances = np.pad(distances, ((0, 0), (0, k - c)), constant_values=np.inf)
        ids = np.pad(ids, ((0, 0), (0, k - c)), constant_values=NOBODY)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return Found(np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1))


def of_places(
    queries: Floats, ids: Ids, find: Callable[[Ids], Ids], vectors: Tensor
) -> tuple[Floats, Ids]:
    """Distances (q, c) of candidates by the rows of ``vectors`` in which ``find`` says they are."""
    places = find(ids.reshape(-1)).reshape(ids.shape)
    return _far(queries, ids, lambda part: _picked(vectors, places[part]), places < 0)


def of_read(queries: Floats, ids: Ids, read: Callable[[Ids], Floats]) -> tuple[Floats, Ids]:
    """Distances (q, c) of candidates by the vectors that ``read`` gives."""
    some = ids.max(initial=NOBODY) if ids.size else NOBODY
    if some == NOBODY:
        return np.full(ids.shape, np.inf, dtype=np.float32), ids
    # any id that is stored, in the place of none
    named = np.where(ids == NOBODY, some, ids)

    def fetched(part: slice) -> Tensor:
        each, back = np.unique(named[part], return_inverse=True)
        return torch.from_numpy(read(each))[torch.from_numpy(back.reshape(-1))]

    return _far(queries, ids, fetched, ids == NOBODY)


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
    index = torch.from_numpy(np.maximum(places, 0).reshape(-1))
    return vectors.index_select(0, index).float()


def _far(
    queries: Floats, ids: Ids, fetched: Callable[[slice], Tensor], nobody: np.ndarray
) -> tuple[Floats, Ids]:
    q, c = ids.shape
    out = np.full((q, c), np.inf, dtype=np.float32)
    rows = torch.from_numpy(queries)
    step = max(1, BLOCK // max(c, 1))
    for start in range(0, q if c else 0, step):
        part = slice(start, min(q, start + step))
        held = fetched(part).view(part.stop - start, c, -1)
        found = torch.bmm(held, rows[part].unsqueeze(2)).squeeze(2)
        out[part] = (1 - found).clamp_(min=0).numpy()
    out[nobody] = np.inf
    return out, np.where(nobody, NOBODY, ids)
