"""Search by matrix products in blocks: the best of each row, and who is within a radius.

A block of products stays in the processor's own memory and is looked at there: which entries are
above their row's limit, or above their column's. A row's limit comes from products with a sample
of all columns, so that few entries are looked at twice, whatever the order of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.pool.neighbours.threads import in_threads, one_thread

ROWS = 512
COLUMNS = 512
ON_DEVICE = (4096, 32_768)
"""Rows and columns of a block elsewhere than on the CPU."""
GROUP = 16
STEP = 4
"""Of so many columns one is in the sample, where there are enough."""
SAMPLE = 1024
FEWEST = 128
"""Rows that are worth a thread."""
T = TypeVar("T")


class Best(NamedTuple):
    """Candidates: values (q, c) and columns (q, c), ``lowest`` and -1 where there is none."""

    values: Tensor
    columns: Tensor


class Entries(NamedTuple):
    """Products by row and then by column: rows (p,), columns (p,) and values (p,), by numpy."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[Any]


def search(queries: Tensor, stored: Tensor, c: int, *, holes: Tensor | None = None) -> Best:
    """The c greatest products of each query, in no order.

    queries: (q, d) and stored: (n, d) of one type and device, floating or int8; holes: (h,) int64
    rising, columns that do not count.
    """
    # the same product need not be the same to the last bit in a block of another shape
    margin = 2.0**-20 if queries.dtype.is_floating_point else 0.0

    def best(_start: int, count: int, found: Entries) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return _best(found, count, c)

    empty = _numbers(torch.empty(0, c, dtype=_of_products(queries)))
    with one_thread() as threads:
        parts = near(queries, stored, c, best, margin=margin, holes=holes, threads=threads)
    values = np.concatenate([empty, *(part[0] for part in parts)])
    columns = np.concatenate([empty.astype(np.int64), *(part[1] for part in parts)])
    return Best(*(torch.from_numpy(part).to(queries.device) for part in (values, columns)))


def near(
    queries: Tensor,
    stored: Tensor,
    k: int,
    then: Callable[[int, int, Entries], T],
    *,
    margin: float,
    holes: Tensor | None = None,
    bound: Tensor | None = None,
    threads: int = 1,
) -> list[T]:
    """What may be among the k greatest of its row, and what is above its column's bound.

    Of each row at least all products that are not below its k-th greatest by more than ``margin``,
    in the products' unit. bound: (n,) of the products' type, which is int32 for int8, within
    ``limits``. then: is called for so many rows at a time, with the first of them, their number and
    their entries, in which rows count from 0 in each part; in so many threads at once. Returns what
    it gave, in the order of the rows.
    """
    height, width = (ROWS, COLUMNS) if queries.device.type == "cpu" else ON_DEVICE
    if queries.device.type != "cpu":
        threads = 1
    height = min(height, max(FEWEST, -(-len(queries) // threads)))
    if holes is not None and not len(holes):
        holes = None
    sample = _sample(stored, holes, k)

    def one(start: int) -> T:
        part = queries[start : start + height]
        size = len(part) * min(width, len(stored))
        products = torch.empty(size, dtype=_of_products(queries), device=queries.device)
        on_cpu = products.device.type == "cpu"
        room = _Room(products, np.empty((2, size if on_cpu else 0), bool), width)
        low = _limit(part, *sample, k, margin, room)
        found = _entries(part, stored, low, holes, bound, room)
        return then(start, len(part), _thinned(found, len(part), k, margin, bound))

    return in_threads(one, range(0, len(queries), height), threads)


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """What bounds are cut to: below every product and above every one, but above ``lowest``."""
    return (-3.0, 3.0) if dtype.is_floating_point else (1 - 2**30, 2**30)


def lowest(dtype: torch.dtype) -> float:
    """What stands where there is no product: less than any."""
    return -4.0 if dtype.is_floating_point else -(2**30)


class _Room(NamedTuple):
    """What blocks of at most ``width`` columns are written into, one after the other."""

    products: Tensor
    marks: NDArray[np.bool_]
    width: int


def _sample(stored: Tensor, holes: Tensor | None, k: int) -> tuple[Tensor, Tensor | None]:
    """Some of the columns, evenly spread, and which of them do not count."""
    step = max(1, min(STEP, len(stored) // max(SAMPLE, 8 * k)))
    if holes is not None:
        holes = holes[holes % step == 0] // step
    return stored[::step].contiguous(), holes


def _limit(
    queries: Tensor, sample: Tensor, holes: Tensor | None, k: int, margin: float, room: _Room
) -> Tensor:
    """(q, 1) what the k greatest products of each row are not below, with the margin."""
    dtype, q = _of_products(queries), len(queries)
    least, most = limits(dtype)
    if not k or not len(sample):
        return torch.full((q, 1), most if not k else least, dtype=dtype, device=queries.device)
    # as many groups as k reach the k-th of their greatest, hence as many products do
    group = max(1, min(GROUP, len(sample) // (8 * k)))
    greatest = []
    for _, found in _products(queries, sample, holes, room):
        wide = found.shape[1] // group * group
        if wide:
            greatest.append(found[:, :wide].view(q, group, -1).amax(1))
        greatest.append(found[:, wide:].clone())
    tops = torch.cat(greatest, 1)
    if tops.shape[1] <= k:
        return torch.full((q, 1), least, dtype=dtype, device=queries.device)
    if _by_numpy(tops):  # several times as fast
        n = tops.shape[1]
        kth = torch.from_numpy(np.partition(tops.numpy(), n - k, axis=1)[:, n - k, None])
    else:
        kth = tops.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return (kth - (margin if dtype.is_floating_point else int(margin) + 1)).clamp_(min=least)


def _entries(
    queries: Tensor,
    stored: Tensor,
    low: Tensor,
    holes: Tensor | None,
    bound: Tensor | None,
    room: _Room,
) -> Entries:
    """What is not below its row's limit, and what is above its column's."""
    rows, columns, values = [], [], []
    for start, found in _products(queries, stored, holes, room):
        own = None if bound is None else bound[start : start + found.shape[1]]
        places, products = _marked(found, low, own, room.marks)
        row, column = np.divmod(places, found.shape[1])
        rows.append(row)
        columns.append(column + start)
        values.append(products)
    if not rows:
        none = np.empty(0, np.int64)
        return Entries(none, none, _numbers(low[:0, 0]))
    every = np.concatenate(rows)
    # small numbers are sorted by their digits, in one pass over each
    order = np.argsort(every.astype(np.uint16), kind="stable")
    return Entries(every[order], np.concatenate(columns)[order], np.concatenate(values)[order])


def _products(
    queries: Tensor, stored: Tensor, holes: Tensor | None, room: _Room
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of products (q, w), ``lowest`` in holes, and their first columns.

    A block is overwritten by the next one.
    """
    for start in range(0, len(stored), room.width):
        block = stored[start : start + room.width]
        shape = len(queries), len(block)
        found = room.products[: shape[0] * shape[1]].view(shape)
        if queries.dtype == torch.int8:
            torch._int_mm(queries, block.T, out=found)
        else:
            torch.mm(queries, block.T, out=found)
        if holes is not None:
            here = holes[(holes >= start) & (holes < start + len(block))]
            found.index_fill_(1, here - start, lowest(found.dtype))
        yield start, found


def _marked(
    found: Tensor, low: Tensor, bound: Tensor | None, room: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Where a block's entries reach ``low``, (q, 1), or are above ``bound``, (w,); and these."""
    if not _by_numpy(found):
        mark = torch.ge(found, low)
        if bound is not None:
            mark |= found > bound
        at = mark.view(-1).nonzero().squeeze(1)
        return at.cpu().numpy(), _numbers(found.view(-1)[at])
    # numpy compares several times as fast as torch does
    held = found.numpy()
    marks = room[0, : held.size].reshape(held.shape)
    np.greater_equal(held, low.numpy(), out=marks)
    if bound is not None:
        also = room[1, : held.size].reshape(held.shape)
        np.greater(held, bound.numpy(), out=also)
        marks |= also
    flat = marks.reshape(-1)
    if flat.size % 8:
        places = np.flatnonzero(flat)
    else:  # eight entries are looked at together: nearly all such words are 0
        words = np.flatnonzero(flat.view(np.int64) != 0)
        within = np.flatnonzero(flat.reshape(-1, 8)[words])
        places = (words[within >> 3] << 3) + (within & 7)
    return places, held.reshape(-1)[places]


def _thinned(found: Entries, q: int, k: int, margin: float, bound: Tensor | None) -> Entries:
    """Without what is below the k-th of all its row's entries by more than the margin."""
    rows, columns, values = found
    if not k or not len(rows):
        return found
    table, _ = by_row(rows, values, q, np.iinfo(np.int32).min if values.dtype.kind == "i" else -9)
    if table.shape[1] <= k:
        return found
    kth = np.partition(table, table.shape[1] - k, axis=1)[:, table.shape[1] - k]
    stays = values >= (kth - (margin if values.dtype.kind == "f" else int(margin) + 1))[rows]
    if bound is not None:
        stays |= values > _numbers(bound)[columns]
    return Entries(rows[stays], columns[stays], values[stays])


def by_row(
    rows: NDArray[np.int64], values: NDArray[Any], q: int, empty: Any
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Values (p,) of rows (p,), rising, in a table (q, w) with ``empty`` behind them.

    And where each value went: its column (p,).
    """
    counts = np.bincount(rows, minlength=q)
    slots = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    table = np.full((q, int(counts.max(initial=0))), empty, values.dtype)
    table[rows, slots] = values
    return table, slots


def _best(found: Entries, q: int, c: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The c greatest of each row's entries, and their columns."""
    rows, columns, values = found
    none = lowest(torch.float32 if values.dtype.kind == "f" else torch.int32)
    table, slots = by_row(rows, values, q, none)
    names = np.full(table.shape, -1, np.int64)
    names[rows, slots] = columns
    w = table.shape[1]
    if w > c:
        chosen = np.argpartition(table, w - c, axis=1)[:, w - c :] if c else np.empty((q, 0), "i8")
        return np.take_along_axis(table, chosen, 1), np.take_along_axis(names, chosen, 1)
    more = ((0, 0), (0, c - w))
    return np.pad(table, more, constant_values=none), np.pad(names, more, constant_values=-1)


def _of_products(queries: Tensor) -> torch.dtype:
    return torch.int32 if queries.dtype == torch.int8 else queries.dtype


def _by_numpy(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype != torch.bfloat16


def _numbers(values: Tensor) -> NDArray[Any]:
    """By numpy, which has no bfloat16."""
    held = values.float() if values.dtype.is_floating_point else values
    found: NDArray[Any] = held.cpu().numpy()
    return found
