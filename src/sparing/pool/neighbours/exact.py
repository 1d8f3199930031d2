"""Exact search: every stored vector is looked at, in blocks, on any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown
from sparing.pool.neighbours import blocks
from sparing.pool.neighbours.coarse import PRECISIONS, Coarse
from sparing.pool.neighbours.protocol import (
    NOBODY,
    Floats,
    Found,
    Ids,
    Joined,
    Neighbours,
    Pairs,
    Radius,
    checked_ids,
    no_pairs,
)
from sparing.pool.neighbours.rows import Rows, fetch

CANDIDATES = 16
PAIRS = 1 << 14
RANKED = 512
"""Rows whose candidates' vectors are fetched together."""


@final
class Exact(Neighbours):
    """Blockwise search over all vectors.

    precision: "float32"; "bfloat16" or "int8", in which k and ``candidates`` more of each row are
    found and then ranked in float32; or "auto", what is fastest on the device. The result is that
    of float32 in all of them, pairs of ``join`` too: see ``coarse``. 9 bytes an item besides the
    vectors (4 bytes an entry, and 2 or 1 more to search by).
    """

    kind: ClassVar[str] = "exact"

    def __init__(
        self,
        dim: int,
        *,
        precision: str = "auto",
        candidates: int = CANDIDATES,
        device: str = "cpu",
    ) -> None:
        super().__init__(dim)
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        require_whole("candidates", candidates, 1)
        self.precision, self.candidates, self.device = precision, candidates, device
        place = torch.device(device)
        self.coarse = Coarse(precision, dim, place)
        self.rows = (
            Rows(dim, (torch.float32,), place)
            if self.coarse.plain
            else Rows(dim, (torch.float32, self.coarse.dtype), place, self.coarse.code)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self) -> Ids:
        return self.rows.ids()

    def vectors(self, ids: Ids) -> Floats:
        return fetch(self.rows.tensors[0], self.rows.places(np.asarray(ids, dtype=np.int64)))

    def add(self, ids: Ids, vectors: Floats) -> None:
        self.rows.add(*self.checked_pair(ids, vectors))

    def update(self, ids: Ids, vectors: Floats) -> None:
        ids, vectors = self.checked_pair(ids, vectors)
        self.rows.write(self.rows.places(ids), vectors)

    def remove(self, ids: Ids) -> None:
        self.rows.remove(checked_ids(ids))
        self.rows.close()

    def query(self, vectors: Floats, k: int) -> Found:
        return Found(*self._search(vectors, k, None)[:2])

    def join(self, vectors: Floats, k: int, radius: Radius) -> Joined:
        return self._search(vectors, k, self.radii(radius))

    @torch.no_grad()
    def _search(self, vectors: Floats, k: int, radius: Floats | None) -> Joined:
        require_whole("k", k, 0)
        held, coarse = self.rows, self.coarse
        queries = torch.from_numpy(self.checked(vectors)).to(held.device)
        fine, codes = held.tensors[0][: held.used], held.tensors[-1][: held.used]
        holes = torch.from_numpy(held.holes).to(held.device)
        c = min(len(held), k if coarse.plain or not k else k + self.candidates)
        bound = None
        if radius is not None:
            wide = torch.from_numpy(held.spread(radius)).to(held.device)
            bound = coarse.bound(1 - wide)
        coded = queries if coarse.plain else coarse.code(queries)
        best, hits = blocks.search(coded, codes, c, holes=holes, bound=bound)
        at = torch.from_numpy(held.at[: held.used])
        distances, ids = _ranked(queries, fine, best.columns, at, k)
        if not coarse.plain and 0 < k < c < len(held):
            worst = best.values.amin(1).float().cpu().numpy()
            kth = (1 - distances[:, -1] - coarse.slack) * coarse.scale
            unsure = np.flatnonzero(worst > kth)
            if len(unsure):
                rows = queries[torch.from_numpy(unsure).to(held.device)]
                again, _ = blocks.search(rows, fine, k, holes=holes)
                distances[unsure], ids[unsure] = _ranked(rows, fine, again.columns, at, k)
        if radius is None:
            return Joined(distances, ids, no_pairs())
        between = _apart(queries, fine, hits) if not coarse.plain else _from(hits.values)
        near = between < wide[hits.columns]
        rows, columns = hits.rows[near].cpu(), hits.columns[near].cpu()
        order = np.lexsort((columns.numpy(), rows.numpy()))
        pairs = Pairs(
            at[columns].numpy()[order], rows.numpy()[order], between[near].cpu().numpy()[order]
        )
        return Joined(distances, ids, pairs)

    def state(self) -> dict[str, Any]:
        self.rows.close(now=True)
        return {
            "dim": self.dim,
            "precision": self.precision,
            "candidates": self.candidates,
            "ids": torch.from_numpy(self.rows.ids()),
            "vectors": self.rows.tensors[0][: self.rows.used].cpu(),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], *, device: str = "cpu") -> Exact:
        try:
            index = cls(
                state["dim"],
                precision=state["precision"],
                candidates=state["candidates"],
                device=device,
            )
            ids, vectors = state["ids"].numpy(), state["vectors"].numpy()
        except KeyError as error:
            raise RequestError(f"the state of an exact index lacks {error}") from error
        index.rows.add(ids, vectors)
        return index


def _ranked(
    queries: Tensor, fine: Tensor, columns: Tensor, at: Tensor, k: int
) -> tuple[Floats, Ids]:
    """The k nearest of each row's candidates (q, c), by distance in float32 and then by id."""
    q, c = columns.shape
    distances = np.full((q, max(k, c)), np.inf, dtype=np.float32)
    ids = np.full((q, max(k, c)), NOBODY, dtype=np.int64)
    for start in range(0, q if c else 0, RANKED):
        part = slice(start, start + RANKED)
        picked = columns[part]
        rows = fine[picked.clamp(min=0).reshape(-1)].view(len(picked), c, -1)
        found = torch.bmm(rows, queries[part].unsqueeze(2)).squeeze(2)
        found = _from(found).masked_fill_(picked < 0, torch.inf)
        distances[part, :c] = found.cpu().numpy()
        ids[part, :c] = torch.where(picked.cpu() < 0, NOBODY, at[picked.cpu().clamp(min=0)])
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _apart(queries: Tensor, fine: Tensor, hits: blocks.Hits) -> Tensor:
    """(p,) the distances of pairs, by float32."""
    out = queries.new_empty(len(hits.rows))
    for start in range(0, len(out), PAIRS):
        part = slice(start, start + PAIRS)
        out[part] = (queries[hits.rows[part]] * fine[hits.columns[part]]).sum(1)
    return _from(out)


def _from(cosines: Tensor) -> Tensor:
    return (1 - cosines).clamp_(min=0)
