"""Tells a first forward pass from one that autograd repeats for activation checkpointing."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """True inside a backward pass, where a forward can only be a checkpoint's recomputation.

    Statistics that count forwards use it, so that checkpointing changes no number. While a graph
    is traced the answer is False: it is known when the graph runs, to what an operator does then.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
