"""How often each value of a column occurs, over a stream of batches."""

from __future__ import annotations

from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.tasks.clicks.columns import Kind, arrow, integers, texts

_SPAN: Final = 1 << 24
"""Whole numbers that span no more than this are counted in a table."""
_PENDING: Final = 1 << 20


@final
class Counter:
    """Counts the values of one categorical column; ``missing`` are counted apart.

    Whole numbers in a narrow span are counted in a table, all else by hashing. Memory grows with
    the number of distinct values, never with the rows.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.missing = 0
        self._low = 0
        self._table: NDArray[np.int64] | None = np.zeros(0, dtype=np.int64)
        self._pending: list[tuple[Any, Any]] = []
        self._waiting = 0
        self._merged = 0

    def add(self, column: Any, kind: Kind) -> None:
        """Count the values of an arrow array, numpy array or list. Errors as for ``integers``."""
        column = arrow(column)
        if kind == "text":
            codes, values = texts(column)
            counts = np.bincount(codes + 1, minlength=len(values) + 1)
            self.missing += int(counts[0])
            seen = np.flatnonzero(counts[1:])
            self._later(values.take(seen), counts[1:][seen])
            return
        numbers, there = integers(column, self.name)
        if there is not None:
            self.missing += int(len(there) - there.sum())
            numbers = numbers[there]
        if len(numbers) and not self._narrow(numbers):
            values, counts = _counted(numbers)
            self._later(values, counts)

    def put(self, values: Any, counts: NDArray[np.int64]) -> None:
        """Count values that occur ``counts`` times, (n,) int64 or a string array without nulls."""
        import pyarrow as pa

        if not pa.types.is_string(arrow(values).type):
            # never a table: it would have to be filled one by one
            self._leave()
        self._later(values, counts)

    def _leave(self) -> None:
        """From the table over to hashing."""
        if self._table is not None and len(self._table):
            kept = np.flatnonzero(self._table)
            self._later(kept + self._low, self._table[kept])
        self._table = None

    def _narrow(self, numbers: NDArray[np.int64]) -> bool:
        """Count in the table if the span allows it."""
        if self._table is None:
            return False
        low, high = int(numbers.min()), int(numbers.max())
        if len(self._table):
            held = self._low + len(self._table) - 1
            low, high = min(low, self._low), max(high, held)
        if high - low >= _SPAN:
            self._leave()
            return False
        if high - low + 1 > len(self._table):
            wider = np.zeros(high - low + 1, dtype=np.int64)
            wider[self._low - low if len(self._table) else 0 :][: len(self._table)] = self._table
            self._table, self._low = wider, low
        if len(self._table) <= 4 * len(numbers):
            self._table += np.bincount(numbers - self._low, minlength=len(self._table))
        else:
            np.add.at(self._table, numbers - self._low, 1)
        return True

    def _later(self, values: Any, counts: NDArray[Any]) -> None:
        import pyarrow as pa

        self._pending.append((pa.array(values), pa.array(counts, pa.int64())))
        self._waiting += len(counts)
        if self._waiting > max(_PENDING, self._merged):
            self._merge()

    def _merge(self) -> None:
        import pyarrow as pa

        values = pa.chunked_array([value for value, _ in self._pending])
        counts = pa.chunked_array([count for _, count in self._pending])
        table = pa.table({"value": values, "count": counts})
        found = table.group_by("value", use_threads=False).aggregate([("count", "sum")])
        self._pending = [(found["value"].combine_chunks(), found["count_sum"].combine_chunks())]
        self._waiting, self._merged = 0, found.num_rows

    def counted(self) -> tuple[Any, NDArray[np.int64]]:
        """Distinct values and their counts, most frequent first, equally frequent ones by value.

        Values are an int64 array or an arrow string array. The order of the rows plays no part.
        """
        if self._table is not None and len(self._table):
            kept = np.flatnonzero(self._table)
            values, counts = kept + self._low, self._table[kept]
            order = np.lexsort((values, -counts))
            return values[order], counts[order]
        if not self._pending:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        import pyarrow as pa
        import pyarrow.compute as pc

        self._merge()
        ((found, count),) = self._pending
        chosen = pc.sort_indices(
            pa.table({"value": found, "count": count}),
            sort_keys=[("count", "descending"), ("value", "ascending")],
        )
        counts = np.asarray(count.take(chosen).to_numpy(zero_copy_only=False))
        values = found.take(chosen)
        return (values if pa.types.is_string(values.type) else values.to_numpy()), counts


def _counted(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.value_counts(pa.array(numbers))
    return found.field("values").to_numpy(), found.field("counts").to_numpy()
