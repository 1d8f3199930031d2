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
