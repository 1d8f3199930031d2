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
    empty,
    no_pairs,
)
from sparing.pool.neighbours.rows import Rows, fetch
from sparing.pool.neighbours.threads import one_thread

PAIRS = 256
"""Pairs whose vectors are fetched together: they stay in the processor's own memory."""
_NONE = int(np.float32(np.inf).view(np.int32)) << 32
"""The key of nobody, at an infinite distance."""


@final
class Exact(Neighbours):
    """Blockwise search over all vectors.

    precision: "float32"; "bfloat16" or "int8", in which all is found that may be among a row's k
    nearest, and then ranked in float32; or "auto", what is fastest on the device. The result is
    that of float32 in all of them, pairs of ``join`` too: see ``coarse``. 9 bytes an item besides
    the vectors (4 bytes an entry, and 2 or 1 more to search by).
    """

    kind: ClassVar[str] = "exact"

    def __init__(
        self,
        dim: int,
        *,
        precision: str = "auto",
        device: str = "cpu",
    ) -> None:
        super().__init__(dim)
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        self.precision, self.device = precision, device
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
        with one_thread():
            self.rows.add(*self.checked_pair(ids, vectors))

    def update(self, ids: Ids, vectors: Floats) -> None:
        ids, vectors = self.checked_pair(ids, vectors)
        self.rows.write(self.rows.places(ids), vectors)

    def remove(self, ids: Ids) -> None:
        self.rows.remove(checked_ids(ids))
        self.rows.close()

    def query(self, vectors: Floats, k: int) -> Found:
        with one_thread() as threads:
            return Found(*self._search(vectors, k, None, threads)[:2])

    def join(self, vectors: Floats, k: int, radius: Radius) -> Joined:
        with one_thread() as threads:
            return self._search(vectors, k, self.radii(radius), threads)

    @torch.no_grad()
    def _search(self, vectors: Floats, k: int, radius: Floats | None, threads: int) -> Joined:
        require_whole("k", k, 0)
        held, coarse = self.rows, self.coarse
        queries = torch.from_numpy(self.checked(vectors)).to(held.device)
        fine, codes = held.tensors[0][: held.used], held.tensors[-1][: held.used]
        if not len(held) or not len(queries):
            return Joined(*empty(len(queries), k), no_pairs())
        wide = None if radius is None else held.spread(radius)
        bound = None if wide is None else coarse.bound(1 - torch.from_numpy(wide)).to(held.device)
        ranks, order = held.ranks()

        def ranked(start: int, count: int, found: blocks.Entries) -> tuple[Any, ...]:
            rows, columns, values = found
            cosines = values if coarse.plain else _cosines(queries[start:], fine, rows, columns)
            apart = np.maximum(1 - cosines, 0)
            names = columns if ranks is None else ranks[columns]
            best = _least(rows, apart, names, count, k)
            if wide is None:
                return best
            inside = apart < wide[columns]
            return *best, columns[inside], rows[inside] + start, apart[inside]

        parts = blocks.near(
            queries if coarse.plain else coarse.code(queries),
            codes,
            min(k, len(held)),
            ranked,
            margin=2 * coarse.slack * coarse.scale,
            holes=torch.from_numpy(held.holes).to(held.device),
            bound=bound,
            threads=threads,
        )
        distances, rank, *pairs = (np.concatenate(part) for part in zip(*parts, strict=True))
        places = rank if order is None else order[rank]
        ids = np.where(np.isinf(distances), NOBODY, held.at[places])
        if wide is None:
            return Joined(distances, ids, no_pairs())
        at, rows, apart = pairs
        return Joined(distances, ids, Pairs(held.at[at], rows, apart))

    def state(self) -> dict[str, Any]:
        self.rows.close(now=True)
        return {
            "dim": self.dim,
            "precision": self.precision,
            "ids": torch.from_numpy(self.rows.ids()),
            "vectors": self.rows.tensors[0][: self.rows.used].cpu(),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], *, device: str = "cpu") -> Exact:
        try:
            index = cls(state["dim"], precision=state["precision"], device=device)
            ids, vectors = state["ids"].numpy(), state["vectors"].numpy()
        except KeyError as error:
            raise RequestError(f"the state of an exact index lacks {error}") from error
        index.rows.add(ids, vectors)
        return index


def _cosines(queries: Tensor, fine: Tensor, rows: Ids, columns: Ids) -> Floats:
    """(p,) products in float32 of rows of the one with rows of the other."""
    out = np.empty(len(rows), dtype=np.float32)
    one, two = queries.new_empty(2, PAIRS, queries.shape[1])
    for start in range(0, len(out), PAIRS):
        part = slice(start, start + PAIRS)
        count = len(rows[part])
        torch.index_select(queries, 0, torch.from_numpy(rows[part]).to(one.device), out=one[:count])
        torch.index_select(fine, 0, torch.from_numpy(columns[part]).to(one.device), out=two[:count])
        out[part] = torch.linalg.vecdot(one[:count], two[:count]).cpu().numpy()
    return out


def _least(rows: Ids, distances: Floats, ranks: Ids, q: int, k: int) -> tuple[Floats, Ids]:
    """The k least distances of each row, equal ones by rank, and the ranks: (q, k) each."""
    # a distance is not negative: its bits are ordered as it is, and the rank decides behind them
    keys = (distances.view(np.int32).astype(np.int64) << 32) | ranks
    table, _ = blocks.by_row(rows, keys, q, _NONE)
    if table.shape[1] < k:
        table = np.pad(table, ((0, 0), (0, k - table.shape[1])), constant_values=_NONE)
    best = np.sort(table, axis=1)[:, :k]
    return (best >> 32).astype(np.int32).view(np.float32), best & 0xFFFFFFFF
