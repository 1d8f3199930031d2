"""Stored vectors and their ids: arrays that grow by doubling, with holes that are closed in time.

Rows stay in the order in which they came. What is removed leaves a hole of zeros; once a quarter
of the rows are holes they are closed in one pass, so that a removal costs what it removes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.pool.neighbours.protocol import NOBODY, Floats, Ids

HOLES = 0.25
SPARSE = 4
"""Ids for each that is there up to which a table of all of them is kept."""
LEAST = 1024


@final
class Rows:
    """Ids by place, places by id, and one tensor of vectors or more, row by row.

    ``tensors`` are (capacity, d) each, in the types and on the device that were asked for, the last
    as ``coded`` makes it; rows behind ``used`` are not set. 9 bytes an item for its id; where ids
    leave gaps 4 to 6 more for each id up to the last, and 16 more where they did not come in
    rising order.
    """

    def __init__(
        self,
        dim: int,
        dtypes: tuple[torch.dtype, ...],
        device: torch.device,
        coded: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.dim, self.device, self.coded = dim, device, coded
        self.used = 0  # places, holes among them
        self.holes: Ids = np.empty(0, dtype=np.int64)  # rising
        self.at: Ids = np.empty(0, dtype=np.int64)  # (capacity,) id by place, of holes as it was
        self.alive = np.empty(0, dtype=bool)  # (capacity,)
        self.tensors = tuple(torch.empty(0, dim, dtype=d, device=device) for d in dtypes)
        # ids that came in rising order are their own index; else they are kept sorted, with places
        self._sorted: tuple[Ids, Ids] | None = None
        # while ids rise but leave gaps, a table is ten times as fast as a search among them
        self._place: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._tabled = 0  # places that are in it

    def __len__(self) -> int:
        return self.used - len(self.holes)

    def ids(self) -> Ids:
        """(N,) of what is there, by place."""
        held = self.at[: self.used]
        return held[self.alive[: self.used]] if len(self.holes) else held.copy()

    def places(self, ids: Ids) -> Ids:
        """Where these are. Raises RequestError for one that is not there."""
        found = self.find(ids)
        missing = np.flatnonzero(found < 0)
        if len(missing):
            raise RequestError(
                f"id {int(ids[missing[0]])} is not in the index ({len(missing)} of {len(ids)} "
                "are not); it was never added, or is removed"
            )
        return found

    def find(self, ids: Ids) -> Ids:
        """The places, -1 for an id that is not there."""
        names, places = self._sorted or (self.at[: self.used], None)
        if not len(names):
            return np.full(len(ids), NOBODY, dtype=np.int64)
        first, last = int(names[0]), len(names) - 1
        span = int(names[last]) - first
        if span == last:  # none is missing: ids are places
            spot = np.clip(ids - first, 0, last)
        elif places is None and span < SPARSE * len(names):
            spot = self._table()[np.clip(ids - first, 0, span)].astype(np.int64)
        else:
            spot = np.minimum(np.searchsorted(names, ids), last)
        found = spot if places is None else places[spot]
        return np.where((names[spot] == ids) & self.alive[found], found, NOBODY)

    def _table(self) -> NDArray[np.int32]:
        """Places by id, from the first on, of ids that came in rising order; 0 for no id."""
        names, done = self.at[: self.used], self._tabled
        span = int(names[-1] - names[0]) + 1
        if span > len(self._place):
            self._place = np.zeros(span + span // 2, dtype=np.int32)
            done = 0
        self._place[names[done:] - names[0]] = np.arange(done, self.used)
        self._tabled = self.used
        return self._place

    def ranks(self) -> tuple[Ids, Ids] | tuple[None, None]:
        """The rank of each place's id among all ids, and the place of each rank; None: the same."""
        if self._sorted is None:
            return None, None
        order = self._sorted[1]
        ranks = np.full(self.used, NOBODY, dtype=np.int64)
        ranks[order] = np.arange(len(order))
        return ranks, order

    def add(self, ids: Ids, vectors: Floats) -> None:
        """Append new rows. Raises RequestError for an id that is there."""
        known = np.flatnonzero(self.find(ids) >= 0)
        if len(known):
            raise RequestError(
                f"id {int(ids[known[0]])} is in the index already; use update for another vector"
            )
        if not len(ids):
            return
        start, end = self.used, self.used + len(ids)
        self._reserve(end)
        last = int(self.at[start - 1]) if start else -1
        rising = bool(ids[0] > last and (ids[1:] > ids[:-1]).all())
        if self._sorted is None and not rising:
            here = np.flatnonzero(self.alive[:start])
            order = here[np.argsort(self.at[here], kind="stable")]
            self._sorted = self.at[order], order
        if self._sorted is not None:
            order = np.argsort(ids, kind="stable")
            spot = np.searchsorted(self._sorted[0], ids[order])
            self._sorted = (
                np.insert(self._sorted[0], spot, ids[order]),
                np.insert(self._sorted[1], spot, start + order),
            )
        self.at[start:end] = ids
        self.alive[start:end] = True
        self.used = end
        self._write(slice(start, end), vectors)

    def write(self, places: Ids, vectors: Floats) -> None:
        """Set the vectors at these places."""
        self._write(torch.from_numpy(places).to(self.device), vectors)

    def _write(self, where: Tensor | slice, vectors: Floats) -> None:
        given = torch.from_numpy(vectors).to(self.device)
        for number, tensor in enumerate(self.tensors):
            last = number == len(self.tensors) - 1
            rows = self.coded(given) if self.coded and last else given.to(tensor.dtype)
            tensor[where] = rows

    def remove(self, ids: Ids) -> None:
        """Leave holes where these were. Call ``close`` afterwards."""
        places = self.places(ids)
        self.alive[places] = False
        for tensor in self.tensors:
            tensor[torch.from_numpy(places).to(self.device)] = 0
        self.holes = np.sort(np.concatenate([self.holes, places]))
        if self._sorted is not None:
            kept = self.alive[self._sorted[1]]
            self._sorted = self._sorted[0][kept], self._sorted[1][kept]

    def close(self, *, now: bool = False) -> Ids | None:
        """Close the holes if they are many, or now: the places that moved up, in order, or None."""
        if not len(self.holes) or (not now and len(self.holes) < HOLES * self.used):
            return None
        kept = np.flatnonzero(self.alive[: self.used])
        picked = torch.from_numpy(kept).to(self.device)
        capacity = max(LEAST, len(kept))
        at = np.full(capacity, NOBODY, dtype=np.int64)
        at[: len(kept)] = self.at[kept]
        moved = []
        for tensor in self.tensors:
            fresh = tensor.new_empty(capacity, self.dim)
            torch.index_select(tensor, 0, picked, out=fresh[: len(kept)])
            moved.append(fresh)
        if self._sorted is not None:
            self._sorted = self._sorted[0], np.searchsorted(kept, self._sorted[1])
        self.at, self.tensors, self.used = at, tuple(moved), len(kept)
        self._place, self._tabled = np.empty(0, dtype=np.int32), 0
        self.alive = np.arange(capacity) < len(kept)
        self.holes = np.empty(0, dtype=np.int64)
        return kept

    def spread(self, radius: Floats) -> Floats:
        """(N,) in the order of ``ids()`` -> (used,), -inf in holes."""
        if not len(self.holes):
            return radius
        wide = np.full(self.used, -np.inf, dtype=np.float32)
        wide[self.alive[: self.used]] = radius
        return wide

    def _reserve(self, wanted: int) -> None:
        if wanted > len(self.at):
            # few more, as memory an item counts; vectors, which are long, are copied more seldom
            room = max(LEAST, wanted, len(self.at) * 33 // 32)
            at = np.full(room, NOBODY, dtype=np.int64)
            at[: self.used] = self.at[: self.used]
            alive = np.zeros(room, dtype=bool)
            alive[: self.used] = self.alive[: self.used]
            self.at, self.alive = at, alive
        grown = []
        for tensor in self.tensors:
            if wanted > len(tensor):
                fresh = tensor.new_empty(max(LEAST, wanted, 2 * len(tensor)), self.dim)
                fresh[: self.used] = tensor[: self.used]
                tensor = fresh
            grown.append(tensor)
        self.tensors = tuple(grown)


def fetch(tensor: Tensor, places: Ids) -> Floats:
    """(n, d) float32 on the CPU of these places."""
    index = torch.from_numpy(places).to(tensor.device)
    found: Floats = tensor.index_select(0, index).float().cpu().numpy()
    return found
