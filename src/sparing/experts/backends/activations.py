"""The activations by name, each written into a buffer, and each one's backward in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """One activation three ways.

    ``plain(a)`` is differentiable; ``into(a, out)`` writes into ``out``; ``back_(gradient, a)``
    multiplies the gradient by the derivative at ``a``, in place.
    """

    plain: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], Tensor]
    back_: Callable[[Tensor, Tensor], Tensor]


def _silu(a: Tensor, out: Tensor) -> Tensor:
    found: Tensor = aten.silu.out(a, out=out)
    return found


def _silu_back_(gradient: Tensor, a: Tensor) -> Tensor:
    found: Tensor = aten.silu_backward.grad_input(gradient, a, grad_input=gradient)
    return found


def _gelu(a: Tensor, out: Tensor, approximate: str) -> Tensor:
    found: Tensor = aten.gelu.out(a, approximate=approximate, out=out)
    return found


def _gelu_back_(gradient: Tensor, a: Tensor, approximate: str) -> Tensor:
    found: Tensor = aten.gelu_backward.grad_input(
        gradient, a, approximate=approximate, grad_input=gradient
    )
    return found


def _relu(a: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(a, 0, out=out)


def _relu_back_(gradient: Tensor, a: Tensor) -> Tensor:
    found: Tensor = aten.threshold_backward.grad_input(gradient, a, 0, grad_input=gradient)
    return found


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _silu, _silu_back_),
    "gelu": Activation(
        F.gelu, partial(_gelu, approximate="none"), partial(_gelu_back_, approximate="none")
    ),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"),
        partial(_gelu, approximate="tanh"),
        partial(_gelu_back_, approximate="tanh"),
    ),
    "relu": Activation(F.relu, _relu, _relu_back_),
}
