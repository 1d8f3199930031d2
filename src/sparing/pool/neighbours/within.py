"""Neighbours among what is stored and what comes with the same batch, together."""

from __future__ import annotations

import numpy as np
import torch

from sparing.core.errors import RequestError
from sparing.pool.neighbours import blocks, ranking
from sparing.pool.neighbours.protocol import (
    NOBODY,
    Floats,
    Found,
    Ids,
    Joined,
    Neighbours,
    Radius,
    empty,
    no_pairs,
)
from sparing.pool.neighbours.threads import in_threads, one_thread

NEARLY = np.float32(1e-6)
INSIDE = 256
"""Rows of a batch that are compared with those behind them at once."""
INCOMING = -2
"""The id of the batch's row j reads -2 - j as long as it has none."""


def both(
    index: Neighbours,
    vectors: Floats,
    k: int,
    *,
    ids: Ids | None = None,
    radius: Radius | None = None,
) -> Joined:
    """The k nearest of each row of ``vectors`` (q, d) among the stored and the other rows.

    ids: (q,) the rows' own, which are not stored yet; without them row j reads ``-2 - j``.
    radius: as for ``Neighbours.join``; without it there are no pairs. A row is not its own
    neighbour. Equal distances: stored ones first, then by id (by row without ids).
    """
    if ids is not None and len(ids) != len(vectors):
        raise RequestError(f"got {len(ids)} ids for {len(vectors)} vectors; give one for each")
    joined = (
        Joined(*index.query(vectors, k), no_pairs())
        if radius is None
        else index.join(vectors, k, radius)
    )
    own = among(index.checked(vectors), k)
    named = np.where(own.ids == NOBODY, NOBODY, INCOMING - own.ids if ids is None else ids[own.ids])
    distances = np.concatenate([joined.distances, own.distances], axis=1)
    candidates = np.concatenate([joined.ids, named], axis=1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return joined._replace(
        distances=np.take_along_axis(distances, order, axis=1),
        ids=np.take_along_axis(candidates, order, axis=1),
    )


@torch.no_grad()
def inside(vectors: Floats, limit: Floats, k: int) -> tuple[Ids, Ids, Floats]:
    """Which rows are nearer to a row than its limit, at least where they are among its k nearest.

    vectors: (q, d), of which no more than some thousand; limit: (q,), infinite where none is known.
    Returns rows, ascending, others and distances, (p,) each; a row is not its own neighbour.
    """
    q = len(vectors)
    if np.isinf(limit).any():
        # a product may be another in its last bits in a block of another shape
        limit = np.minimum(limit, among(vectors, k).distances[:, -1:].max(1, initial=0) + NEARLY)
    reach = np.float32(1) - limit.astype(np.float32)
    held = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))

    def part(start: int) -> tuple[Ids, Ids, Floats]:
        # what is before these rows has been compared with them
        products = torch.mm(held[start : start + INSIDE], held[start:].T).numpy()
        marks = products > reach[start : start + INSIDE, None]
        marks |= products > reach[start:]
        at = np.flatnonzero(marks)
        row, column = np.divmod(at, q - start)
        once = column > row
        return row[once] + start, column[once] + start, products.reshape(-1)[at[once]]

    with one_thread() as threads:
        found = in_threads(part, range(0, q, INSIDE), threads)
    one, two, cosines = (np.concatenate(side) for side in zip(*found, strict=True))
    ways = np.concatenate([one, two]), np.concatenate([two, one])
    apart = np.tile(np.maximum(1 - cosines, 0), 2)
    near = apart < limit[ways[0]]
    rows, others, apart = ways[0][near], ways[1][near], apart[near]
    order = np.argsort(rows * q + others)
    return rows[order], others[order], apart[order]


@torch.no_grad()
def among(vectors: Floats, k: int) -> Found:
    """The k nearest other rows of each row, in float32; ids are numbers of rows."""
    rows = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
    q = len(rows)
    if not k or q < 2:
        return empty(q, k)
    found = blocks.search(rows, rows, min(q, k + 1))
    ids = found.columns.numpy()
    distances = (1 - found.values).clamp_(min=0).numpy()
    itself = ids == np.arange(q)[:, None]
    # among many copies a row may not find itself; then all it found are others, one too many
    distances[itself] = np.inf
    return ranking.best(distances, np.where(itself, NOBODY, ids), k)
