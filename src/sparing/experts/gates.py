"""Gates that are open or closed, and the gradient that both kinds receive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _OpenGates(torch.autograd.Function):
    """Step function with a straight-through backward over the pairs in ``heard``."""

    @staticmethod
    def forward(ctx: Any, margin: Tensor, opened: Tensor, heard: Tensor) -> Tensor:
        ctx.save_for_backward(heard)
        return opened.to(margin.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (heard,) = ctx.saved_tensors
        return grad * heard, None, None


def open_gates(margin: Tensor, opened: Tensor, heard: Tensor) -> Tensor:
    """1 where opened, else 0, as float; margin: (T, E) float, opened, heard: (T, E) bool.

    The margin by which a score passes its threshold receives the gates' gradient unchanged
    (straight-through) where ``heard``: at open gates only in DynMoE as released (its ReLU comes
    before the step), or at all live ones, so that a closed gate can learn to open.
    """
    if torch.compiler.is_compiling():
        # the same in plain operations: a graph refuses a function called with one tensor twice
        return opened.to(margin.dtype) + (margin - margin.detach()) * heard
    gates: Tensor = _OpenGates.apply(margin, opened, heard)  # type: ignore[no-untyped-call]
    return gates


class _CreditClosed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, chosen: Tensor, means: Tensor) -> Tensor:
        ctx.save_for_backward(chosen, means)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        chosen, means = ctx.saved_tensors
        credit = (grad.to(means.dtype) @ means.t()).masked_fill(chosen, 0)
        return grad, credit, None, None


def credit_closed_gates(y: Tensor, weights: Tensor, means: Tensor) -> Tensor:
    """Return y unchanged, and in backward credit each closed gate with an output not computed.

    y: (T, d), weights: (T, E), zero where closed; means: (E, d), the running mean of each expert's
    output, which stands in for the output that a closed gate kept from being computed. The
    gradient of a closed weight is then <dL/dy_t, means_e>; open weights get theirs from the rows.
    """
    credited: Tensor = _CreditClosed.apply(y, weights, weights.detach() != 0, means)  # type: ignore[no-untyped-call]
    return credited
