"""How often each row of a table is looked up in a batch.

Two forms: sorted ids with their counts, which cost what the lookups cost, and one count for every
row of the table, which costs a pass over the table and is cheaper where most rows occur.
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

SORTED_UP_TO = 0.5
"""Lookups over rows up to which ids are sorted; see benchmarks/records/cowclip_crossover.json."""


@final
class Occurrences(NamedTuple):
    """``ids``: (u,) int64, ascending, and ``counts``: (u,) int64; or no ids and (rows,) counts."""

    rows: int
    ids: Tensor | None
    counts: Tensor

    def sorted(self) -> tuple[Tensor, Tensor]:
        """The ids that occur, (u,), and their counts, (u,)."""
        if self.ids is not None:
            return self.ids, self.counts
        ids = self.counts.nonzero()[:, 0]
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


@torch.no_grad()
def count(ids: Tensor, rows: int, form: str = "auto") -> Occurrences:
    """Count ids in [0, rows), of any shape and integer dtype.

    ``form``: "rows" sorts them, "dense" counts into an array of all rows, "auto" does what was
    measured to be faster for so many ids and rows.
    """
    flat = ids.detach().reshape(-1)
    if form == "dense" or (form == "auto" and flat.numel() > SORTED_UP_TO * rows):
        return Occurrences(rows, None, torch.bincount(flat, minlength=rows))
    if flat.device.type != "cpu":
        found, counts = torch.unique(flat, return_counts=True)
        return Occurrences(rows, found.long(), counts)
    # numpy's sort is many times faster here than torch.unique, and faster still for 32 bits
    narrow = np.int32 if rows <= np.iinfo(np.int32).max else np.int64
    ordered = np.sort(flat.numpy().astype(narrow))
    first = np.empty(ordered.size, dtype=bool)
    first[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    counts = np.diff(starts, append=ordered.size)
    return Occurrences(
        rows, torch.from_numpy(ordered[starts].astype(np.int64)), torch.from_numpy(counts)
    )


def weighted(ids: Tensor, counts: Tensor, rows: int) -> Occurrences:
    """Ids that may repeat, (n,), each with a count, (n,)."""
    found, place = torch.unique(ids, return_inverse=True)
    return Occurrences(rows, found, counts.new_zeros(found.numel()).index_add_(0, place, counts))


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
