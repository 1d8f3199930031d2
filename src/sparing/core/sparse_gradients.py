"""Gradients of tables with ``sparse=True``: who takes them, rows added up, their global norm."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from sparing.core import ranks
from sparing.core.errors import RequestError

DENSE_ONLY = (
    torch.optim.Adam,  # and AdamW, which is one
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.LBFGS,
)
NO_DECAY = (torch.optim.SGD, torch.optim.Adagrad)
_PACKED = 2**31
"""Rows, and entries, of which two fit into 64 bits."""
WAY_OUT = (
    'use optimizer "rowwise" (sparing.updates.rowwise.RowWise), torch.optim.SparseAdam for the '
    "tables alone, or SGD or Adagrad without weight decay; or build the table with sparse=False"
)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise RequestError if a table with sparse gradients is an optimizer's that takes none."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or not module.sparse:
            continue
        group = groups.get(id(module.weight))
        if group is None:
            continue
        kind = type(optimizer).__name__
        if isinstance(optimizer, DENSE_ONLY):
            raise RequestError(
                f"table {name} has sparse gradients, and {kind} takes none: {WAY_OUT}"
            )
        if isinstance(optimizer, NO_DECAY) and group.get("weight_decay"):
            raise RequestError(
                f"table {name} has sparse gradients, and {kind} takes none with weight_decay="
                f"{group['weight_decay']}: {WAY_OUT}"
            )


def any_sparse(parameters: Iterable[Tensor]) -> bool:
    """Whether a gradient is sparse."""
    return any(p.grad is not None and p.grad.is_sparse for p in parameters)


@torch.no_grad()
def coalesced(grad: Tensor) -> Tensor:
    """A sparse gradient, (rows, d), with each row once, ascending: ``grad.coalesce()``.

    Entries of a row are added in the order in which they stand. On a CPU it takes a fifth of the
    time of torch's: one sort of 64 bits that carry row and place, and the sums of a bag.
    """
    values = grad._values()
    size, rows = len(values), grad.shape[0]
    ours = values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
    fits = values.ndim == 2 and 0 < size < _PACKED and rows <= _PACKED
    if grad.is_coalesced() or not (ours and fits):
        return grad.coalesce()
    plain = grad._indices()[0].numpy()
    if (plain[1:] > plain[:-1]).all():  # as it is already; autograd forgets that it is
        return _marked(grad._indices(), values, grad.shape)
    key = plain << 32
    key |= np.arange(size)
    key.sort()
    order = torch.from_numpy(key.astype(np.uint32).astype(np.int64))
    key >>= 32
    first = np.empty(size, dtype=bool)
    first[0] = True
    np.not_equal(key[1:], key[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    summed = nn.functional.embedding_bag(order, values, torch.from_numpy(starts), mode="sum")
    return _marked(torch.from_numpy(key[starts])[None], summed, grad.shape)


def _marked(ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(ids, values, shape, is_coalesced=True, check_invariants=False)


def add_up(model: nn.Module) -> list[Any]:
    """Have sparse gradients of the model's tables added up fast; the handles of the hooks.

    torch adds the gradients of micro-batches up entry by entry, several times slower than one sort
    of both.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    weights = {id(m.weight): m.weight for m in tables if m.weight.requires_grad}
    # a model that is pickled comes back without them, which is no loss
    hooks = [(w, unserializable_hook(partial(added, w))) for w in weights.values()]  # type: ignore[no-untyped-call]
    return [weight.register_hook(hook) for weight, hook in hooks]  # type: ignore[no-untyped-call]


@torch.no_grad()
def added(weight: Tensor, grad: Tensor) -> Tensor:
    """A hook before a gradient is added to what micro-batches left: of sparse ones, the sum.

    What is there is taken away, and the sum comes in its place. Not beside hooks of others, who are
    to see the gradient of one backward pass, nor under DDP, which has its own.
    """
    if not grad.is_sparse or len(weight._backward_hooks or ()) > 1 or ranks.distributed():
        return grad
    before = weight.grad
    if before is None or not before.is_sparse:
        return coalesced(grad)
    weight.grad = None
    ids = torch.cat([before._indices(), grad._indices()], dim=1)
    values = torch.cat([before._values(), grad._values()])
    return coalesced(torch.sparse_coo_tensor(ids, values, grad.shape, check_invariants=False))


@torch.no_grad()
def clip_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that their norm together is at most ``max_norm``; the norm before it.

    ``torch.nn.utils.clip_grad_norm_``, which has no norm of sparse gradients, and is what runs
    where there are none. Sparse ones are coalesced: entries of the same row add up before they
    are squared.
    """
    every = [p for p in parameters if p.grad is not None]
    if not any_sparse(every):
        return torch.nn.utils.clip_grad_norm_(every, max_norm)
    values = []
    for p in every:
        assert p.grad is not None
        if p.grad.is_sparse:
            p.grad = coalesced(p.grad)
            values.append(p.grad._values())
        else:
            values.append(p.grad)
    norm = torch.nn.utils.get_total_norm(values)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch has it
    for value in values:
        value.mul_(factor.to(value.device))
    return norm
