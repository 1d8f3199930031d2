"""Adaptive column-wise clipping (CowClip): the pure part, without a session.

Zheng et al., AAAI 2023, arXiv 2204.06240: the gradient of an embedding row is clipped to
``cnt * max(r * norm(w), zeta)``, where ``cnt`` is how often the row's id occurs in the batch. The
paper calls the vector of one id a column; tables here have it as a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from sparing.updates.occurrences import Occurrences

FEW = 0.25
"""Share of clipped rows up to which they alone are written."""

GATHERED, PASSED = 1 << 20, 1 << 23
"""Bytes of rows that are read at once: gathered ones, which are copied, and those of a pass."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """The largest norm that a gradient may have.

    ``ratio``: r, of the weight's norm. ``bound``: zeta, a norm too. ``form``: "adaptive" is
    ``cnt * max(r * norm(w), zeta)``, "fixed" is ``cnt * zeta``. ``per``: "row", or "table", which
    compares the norms of all rows that occur together, without counts.
    """

    ratio: float = 1.0
    bound: float = 1e-5
    form: Literal["adaptive", "fixed"] = "adaptive"
    per: Literal["row", "table"] = "row"

    @property
    def never_binds(self) -> bool:
        """Whether no gradient can be above it."""
        return math.inf in ((self.ratio, self.bound) if self.form == "adaptive" else (self.bound,))

    def of(self, counts: Tensor, weights: Tensor) -> Tensor:
        """counts: (n,); weights: (n,) norms, float. Gives (n,)."""
        limit = weights * self.ratio
        limit = limit.fill_(self.bound) if self.form == "fixed" else limit.clamp_min(self.bound)
        return limit.mul_(counts)


def released_bound(bound: float, dimensions: int, ratio: float = 1.0) -> float:
    """The bound that the released program makes of its ``--bound``: r^2 * sqrt(d) * bound.

    It takes the bound by coordinate and multiplies by r twice (LargeBatchCTR, train.py, clip.py).
    """
    return ratio * ratio * math.sqrt(dimensions) * bound


def norms(rows: Tensor) -> Tensor:
    """Euclidean norm of each row, (n, d) to (n,), in float32 at least, whatever the storage."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if rows.device.type == "cpu" and rows.dtype == wide and rows.is_contiguous():
        plain = rows.detach().numpy()  # more than twice as fast as vector_norm for short rows
        return torch.from_numpy(np.sqrt(np.einsum("nd,nd->n", plain, plain)))
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=wide)
    return length


@torch.no_grad()
def factors(grads: Tensor, weights: Tensor, counts: Tensor, threshold: Threshold) -> Tensor:
    """What each row of a gradient is multiplied by: 1, or less where it is clipped.

    grads, weights: (n, d); counts: (n,), 0 for rows that do not occur, which stay as they are.
    A gradient that is not finite stays so: training has to end, not to go on as if nothing were.
    """
    if threshold.per == "table":
        present = counts > 0
        length, limit = norms(grads)[present].norm(), norms(weights)[present].norm()
        limit = (
            torch.full_like(limit, threshold.bound)
            if threshold.form == "fixed"
            else (limit * threshold.ratio).clamp_min(threshold.bound)
        )
        one = torch.where(length > limit, limit / length, 1.0)
        return torch.where(present, one, 1.0)
    length, limit = norms(grads), threshold.of(counts, norms(weights))
    over = (length > limit) & (counts > 0)
    return torch.where(over, limit / length, 1.0)


@torch.no_grad()
def clip_(
    grad: Tensor, weight: Tensor, occurrences: Occurrences, threshold: Threshold, form: str
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Clip a dense gradient of a table in place.

    grad, weight: (rows, d). ``form``: "rows" reads the rows that occur, "dense" all of them; both
    in blocks, so that what is computed on the way stays in the caches.
    Returns the rows looked at (ids, (n,), or None for all), their counts, (n,), and which were
    clipped, (n,) bool.
    """
    ids, counts = (None, occurrences.dense()) if form == "dense" else occurrences.sorted()
    if threshold.per == "table":
        part = (grad, weight) if ids is None else (grad[ids], weight[ids])
        scale = factors(*part, counts, threshold)
        _write_(grad, part[0], ids, scale)
        return ids, counts, scale < 1
    clipped = torch.empty(counts.shape, dtype=torch.bool, device=counts.device)
    row = max(1, grad.shape[1] * grad.element_size())
    size = max(1, (PASSED if ids is None else GATHERED) // row)
    for start in range(0, len(counts), size):
        here = slice(start, start + size)
        rows = None if ids is None else ids[here]
        whole = grad[here] if rows is None else grad
        part = (
            (whole, weight[here])
            if rows is None
            else (grad.index_select(0, rows), weight.index_select(0, rows))
        )
        scale = factors(*part, counts[here], threshold)
        torch.lt(scale, 1, out=clipped[here])
        _write_(whole, part[0], rows, scale)
    return ids, counts, clipped


def _write_(grad: Tensor, read: Tensor, ids: Tensor | None, scale: Tensor) -> None:
    """Scale rows of a gradient: those of ids, (n,), whose values ``read`` has, or all."""
    over = scale < 1
    many = int(over.count_nonzero())
    if many == 0:
        return
    if ids is None and many > FEW * len(scale):
        grad.mul_(scale.to(grad.dtype)[:, None] if grad.dtype == scale.dtype else scale[:, None])
        return
    where = over.nonzero()[:, 0]
    kept = read.index_select(0, where).to(scale.dtype) * scale[where, None]
    grad.index_copy_(0, where if ids is None else ids[where], kept.to(grad.dtype))


@torch.no_grad()
def clip_sparse_(
    grad: Tensor, weight: Tensor, occurrences: Occurrences, threshold: Threshold
) -> tuple[Tensor, Tensor, Tensor]:
    """Clip a coalesced sparse gradient, (rows, d), in place; returns as ``clip_`` does.

    A row without an occurrence has a count of 0 and stays as it is.
    """
    ids, values = grad._indices()[0], grad._values()
    counts = aligned(ids, occurrences)
    scale = factors(values, weight.index_select(0, ids), counts, threshold)
    clipped = scale < 1
    if bool(clipped.any()):
        values.copy_((values.to(scale.dtype) * scale[:, None]).to(values.dtype))
    return ids, counts, clipped


def aligned(ids: Tensor, occurrences: Occurrences) -> Tensor:
    """The count of each of ids: (n,) ascending, 0 for those that do not occur."""
    if occurrences.ids is None:
        return occurrences.counts[ids]
    if ids.numel() == occurrences.ids.numel() and ids.equal(occurrences.ids):
        return occurrences.counts
    if not occurrences.ids.numel():
        return torch.zeros_like(ids)
    place = torch.searchsorted(occurrences.ids, ids).clamp_max(occurrences.ids.numel() - 1)
    return torch.where(occurrences.ids[place] == ids, occurrences.counts[place], 0)
