"""Counts, and where asked gradients, of the global batch: rows of all ranks, joined."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparing.core import ranks
from sparing.core.sparse_gradients import coalesced
from sparing.updates.occurrences import Occurrences, joined_all


def gather(own: Occurrences) -> Occurrences:
    """The occurrences of all ranks together; one collective on each."""
    if not ranks.distributed():
        return own
    ids, counts = own.sorted()
    device = counts.device
    parts = ranks.gather_rows([ids, counts])
    return joined_all([Occurrences(own.rows, i.to(device), c.to(device)) for i, c in parts])


def gather_gradients_(weight: nn.Parameter, own: Occurrences) -> Occurrences:
    """Replace the gradient of a table, which nothing has reduced, by its mean over the ranks.

    Only rows that occur are sent: whatever else a gradient has (a penalty on the whole table, say)
    is lost. All ranks end with the same bits. Returns the occurrences of all ranks.
    """
    if not ranks.distributed():
        return own
    ids, counts = own.sorted()
    grad = weight.grad
    values = _values(weight, grad, ids)
    device, world = weight.device, ranks.world_size()
    gathered = ranks.gather_rows([ids, counts, values])
    parts = [[part.to(device) for part in of_rank] for of_rank in gathered]
    joined = joined_all([Occurrences(own.rows, part[0], part[1]) for part in parts])
    every = joined.sorted()[0]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = torch.zeros(every.numel(), weight.shape[1], dtype=wide, device=device)
    for place, part in zip(_places(every, parts), parts, strict=True):  # in the order of ranks
        total.index_add_(0, place, part[2].to(wide))
    mean = (total / world).to(weight.dtype)
    if grad is not None and not grad.is_sparse:
        grad.zero_().index_copy_(0, every, mean)
    elif grad is None and not any(part[0].numel() for part in parts):
        return joined
    else:
        weight.grad = torch.sparse_coo_tensor(
            every[None], mean, weight.shape, is_coalesced=True, check_invariants=False
        )
    return joined


def _values(weight: nn.Parameter, grad: Tensor | None, ids: Tensor) -> Tensor:
    if grad is None:
        return weight.new_zeros(ids.numel(), weight.shape[1])
    if not grad.is_sparse:
        return grad.index_select(0, ids)
    grad = coalesced(grad)
    found, values = grad._indices()[0], grad._values()
    rows = weight.new_zeros(ids.numel(), weight.shape[1])
    if ids.numel() and found.numel():
        place = torch.searchsorted(ids, found).clamp_max(ids.numel() - 1)
        here = ids[place] == found
        rows.index_copy_(0, place[here], values[here])
    return rows


def _places(every: Tensor, parts: list[list[Tensor]]) -> list[Tensor]:
    return [torch.searchsorted(every, part[0]) for part in parts]
