"""Tells a first forward pass from one that autograd repeats for activation checkpointing."""

from __future__ import annotations

import torch
from torch import Tensor


def recomputing() -> bool:
    """True inside a backward pass, where a forward can only be a checkpoint's recomputation.

    Statistics that count forwards use it, so that checkpointing changes no number. While a graph
    is traced the answer is False: it is known when the graph runs, to what an operator does then.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


@torch.no_grad()
def add_once_(total: Tensor, part: Tensor) -> None:
    """Add ``part`` to ``total`` of the same shape, in place, unless this is a recomputation.

    In a graph too; ``total`` is then not to be read again in the same graph.
    """
    (_add_once if torch.compiler.is_compiling() else _add)(total, part.detach())


def _add(total: Tensor, part: Tensor) -> None:
    if not recomputing():
        total += part


@torch.library.custom_op("sparing::add_once", mutates_args=("total",))
def _add_once(total: Tensor, part: Tensor) -> None:
    _add(total, part)


@_add_once.register_fake
def _(total: Tensor, part: Tensor) -> None:
    return None
