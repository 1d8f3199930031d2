"""Search by matrix products in blocks: the best of each row, and who is within a radius.

A block of similarities is looked at where it may matter only: entries above the row's worst
candidate so far, and entries above their column's own bound. Both are few, so that beside the
product it costs two comparisons an entry and no sort.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROWS = 512
COLUMNS = 8192
ON_DEVICE = (4096, 32_768)
"""Rows and columns of a block elsewhere than on the CPU."""
GROUP = 16


class Best(NamedTuple):
    """Candidates: values (q, c) and columns (q, c), ``lowest`` and -1 where there is none."""

    values: Tensor
    columns: Tensor


class Hits(NamedTuple):
    """Entries: rows (p,), columns (p,) and values (p,)."""

    rows: Tensor
    columns: Tensor
    values: Tensor


def search(
    queries: Tensor,
    stored: Tensor,
    c: int,
    *,
    holes: Tensor | None = None,
    bound: Tensor | None = None,
) -> tuple[Best, Hits]:
    """The c greatest products of each query, and all that are above their column's bound.

    queries: (q, d) and stored: (n, d) of one type and device, floating or int8; holes: (h,) int64
    rising, columns that do not count; bound: (n,) of the products' type, which is int32 for int8,
    within ``limits``. Returns candidates (q, c) in no order, and hits in no order.
    """
    rows, columns = (ROWS, COLUMNS) if queries.device.type == "cpu" else ON_DEVICE
    best: list[Best] = []
    hits: list[Hits] = []
    for start in range(0, len(queries), rows):
        part, within = _one(queries[start : start + rows], stored, c, holes, bound, columns)
        best.append(part)
        hits += [hit._replace(rows=hit.rows + start) for hit in within]
    return (
        Best(*(torch.cat(column) for column in zip(*best, strict=True)))
        if best
        else _nobody(queries, c),
        Hits(*(torch.cat(column) for column in zip(*hits, strict=True)))
        if hits
        else _no_hits(queries),
    )


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """What bounds are cut to: below every product and above every one, but above ``lowest``."""
    return (-3.0, 3.0) if dtype.is_floating_point else (1 - 2.0**30, 2.0**30)


def lowest(dtype: torch.dtype) -> float:
    """What stands where there is no product: less than any."""
    return -4.0 if dtype.is_floating_point else -(2.0**30)


def _one(
    queries: Tensor,
    stored: Tensor,
    c: int,
    holes: Tensor | None,
    bound: Tensor | None,
    columns: int,
) -> tuple[Best, list[Hits]]:
    best = _nobody(queries, c)
    hits = []
    room = len(queries) * min(columns, len(stored))
    out = torch.empty(room, dtype=best.values.dtype, device=queries.device)
    marks = torch.empty(room, dtype=torch.bool, device=queries.device)
    for start in range(0, len(stored), columns):
        block = stored[start : start + columns]
        shape = len(queries), len(block)
        found = _product(queries, block, out[: shape[0] * shape[1]].view(shape))
        mask = marks[: found.numel()].view(shape)
        if holes is not None and len(holes):
            here = holes[(holes >= start) & (holes < start + len(block))]
            found.index_fill_(1, here - start, lowest(found.dtype))
        best = _better(best, found, start, mask)
        if bound is not None:
            within = _nonzero(torch.gt(found, bound[start : start + len(block)], out=mask))
            values = found[within.rows, within.columns]
            hits.append(Hits(within.rows, within.columns + start, values))
    return best, hits


def _better(best: Best, found: Tensor, start: int, mask: Tensor) -> Best:
    """The best of the candidates so far and of a block whose first column is ``start``.

    found: (q, w) products; mask: (q, w) bool, to write into.
    """
    q, width = found.shape
    c = best.values.shape[1]
    if c == 0:
        return best
    worst = best.values.amin(1, keepdim=True)
    if width < 4 * c * GROUP:
        return _merged(best, *_top(found, c, start))
    if start == 0:
        # as many groups as candidates reach it, hence as many entries do
        groups = found[:, : width // GROUP * GROUP].view(q, GROUP, -1).amax(1)
        worst = groups.topk(c, dim=1).values.amin(1, keepdim=True)
        places = _nonzero(torch.ge(found, worst, out=mask))
    else:
        places = _nonzero(torch.gt(found, worst, out=mask))
    p = len(places.rows)
    if p == 0:
        return best
    counts = torch.bincount(places.rows, minlength=q)
    most = int(counts.max())
    if most > 8 * c + 64:
        return _merged(best, *_top(found, c, start))
    slots = torch.arange(p, device=found.device) - (counts.cumsum(0) - counts)[places.rows]
    values = found.new_full((q, most), lowest(found.dtype))
    columns = torch.full((q, most), -1, dtype=torch.int64, device=found.device)
    values[places.rows, slots] = found[places.rows, places.columns]
    columns[places.rows, slots] = places.columns + start
    return _merged(best, values, columns)


def _top(found: Tensor, c: int, start: int) -> tuple[Tensor, Tensor]:
    top = found.topk(min(c, found.shape[1]), dim=1, sorted=False)
    return top.values, torch.where(top.values == lowest(found.dtype), -1, top.indices + start)


def _merged(best: Best, values: Tensor, columns: Tensor) -> Best:
    values = torch.cat([best.values, values], dim=1)
    columns = torch.cat([best.columns, columns], dim=1)
    top = values.topk(best.values.shape[1], dim=1, sorted=False)
    return Best(top.values, columns.gather(1, top.indices))


class _Places(NamedTuple):
    rows: Tensor
    columns: Tensor


def _nonzero(mask: Tensor) -> _Places:
    """Where a mask (q, n) of few True is True, by row and then by column."""
    _q, n = mask.shape
    if mask.device.type != "cpu" or n % 8:
        return _Places(*mask.nonzero(as_tuple=True))
    # eight entries are looked at together: nearly all such words are 0
    words = np.flatnonzero(mask.view(torch.int64).numpy())
    word, within = np.nonzero(mask.view(-1, 8).numpy()[words])
    flat = words[word] * 8 + within
    return _Places(*(torch.from_numpy(part) for part in np.divmod(flat, n)))


def _product(queries: Tensor, block: Tensor, out: Tensor) -> Tensor:
    if queries.dtype == torch.int8:
        return torch._int_mm(queries, block.T, out=out)
    return torch.mm(queries, block.T, out=out)


def _of_products(queries: Tensor) -> torch.dtype:
    return torch.int32 if queries.dtype == torch.int8 else queries.dtype


def _nobody(queries: Tensor, c: int) -> Best:
    dtype = _of_products(queries)
    return Best(
        torch.full((len(queries), c), lowest(dtype), dtype=dtype, device=queries.device),
        torch.full((len(queries), c), -1, dtype=torch.int64, device=queries.device),
    )


def _no_hits(queries: Tensor) -> Hits:
    none = torch.empty(0, dtype=torch.int64, device=queries.device)
    return Hits(none, none, torch.empty(0, dtype=_of_products(queries), device=queries.device))
