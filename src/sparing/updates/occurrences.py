"""How often each row of a table is looked up in a batch.

Two forms: sorted ids with their counts, which cost what the lookups cost, and one count for every
row of the table, which costs a pass over the table and is cheaper where most rows occur.
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from sparing.updates import crossover

NARROW = 2**31 - 1
"""Rows up to which ids are held and sorted as 32 bits."""


@final
class Occurrences(NamedTuple):
    """``ids``: (u,) int64, ascending, and ``counts``: (u,) int64; or no ids and (rows,) counts."""

    rows: int
    ids: Tensor | None
    counts: Tensor

    def occurring(self) -> int:
        """How many ids occur."""
        return len(self.counts) if self.ids is not None else int(self.counts.count_nonzero())

    def sorted(self) -> tuple[Tensor, Tensor]:
        """The ids that occur, (u,), and their counts, (u,)."""
        if self.ids is not None:
            return self.ids, self.counts
        present = self.counts != 0
        if present.device.type == "cpu":  # numpy finds them in a quarter of the time
            ids = torch.from_numpy(np.flatnonzero(present.numpy()))
        else:
            ids = present.nonzero()[:, 0]
        return ids, self.counts[ids]

    def dense(self) -> Tensor:
        """A count for every row: (rows,)."""
        if self.ids is None:
            return self.counts
        return self.counts.new_zeros(self.rows).index_copy_(0, self.ids, self.counts)


def nothing(rows: int, device: torch.device) -> Occurrences:
    """No lookup of a table of so many rows."""
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    return Occurrences(rows, empty, empty)


def held(ids: Tensor, rows: int) -> Tensor:
    """A copy of ids, (n,), as small as the number of rows allows, to be counted later."""
    return ids.to(torch.int32 if rows <= NARROW else torch.int64, copy=True)


@torch.no_grad()
def count(ids: Tensor, rows: int, form: str = "auto") -> Occurrences:
    """Count ids in [0, rows), of any shape and integer dtype.

    ``form``: "rows" sorts them, "dense" counts into an array of all rows, "auto" does what was
    measured to be faster for so many ids and rows.
    """
    flat = ids.detach().reshape(-1)
    if form == "dense" or (form == "auto" and not crossover.sorts(flat.numel(), rows)):
        return Occurrences(rows, None, torch.bincount(flat, minlength=rows))
    if flat.device.type != "cpu":
        found, counts = torch.unique(flat, return_counts=True)
        return Occurrences(rows, found.long(), counts)
    # numpy's sort takes a few nanoseconds an id here, and half of them for 32 bits: many times
    # faster than torch.unique, and than finding first occurrences by writing places into an array
    ordered = flat.numpy().astype(np.int32 if rows <= NARROW else np.int64)
    ordered.sort()
    starts = _starts(ordered)
    counts = np.diff(starts, append=ordered.size)
    return Occurrences(
        rows, torch.from_numpy(ordered[starts].astype(np.int64)), torch.from_numpy(counts)
    )


def weighted(ids: Tensor, counts: Tensor, rows: int) -> Occurrences:
    """Ids that may repeat, (n,), each with a count, (n,)."""
    if ids.device.type != "cpu" or not ids.numel():
        found, place = torch.unique(ids, return_inverse=True)
        total = counts.new_zeros(found.numel()).index_add_(0, place, counts)
        return Occurrences(rows, found, total)
    plain = ids.numpy()
    order = np.argsort(plain, kind="stable")  # merges parts that are in order already
    ordered = plain[order]
    starts = _starts(ordered)
    summed = np.add.reduceat(counts.numpy()[order], starts)
    return Occurrences(rows, torch.from_numpy(ordered[starts]), torch.from_numpy(summed))


def joined_all(parts: list[Occurrences]) -> Occurrences:
    """All of them together; of one table."""
    if len(parts) == 1:
        return parts[0]
    if any(part.ids is None for part in parts):
        total = parts[0].dense().clone()
        for part in parts[1:]:
            total += part.dense()
        return Occurrences(parts[0].rows, None, total)
    ids, counts = (torch.cat([part.sorted()[i] for part in parts]) for i in (0, 1))
    return weighted(ids, counts, parts[0].rows)


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin: (n,) to (u,)."""
    first = np.empty(ordered.size, dtype=bool)
    first[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return np.flatnonzero(first)
