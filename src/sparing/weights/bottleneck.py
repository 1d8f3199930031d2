"""Bottleneck adapters: down, activation, up, added to what passes by.

Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2020 (arXiv 2005.00247), parallel adapters
of He et al. 2022 (arXiv 2110.04366). Defaults are those of adapter-hub's ``adapters`` library.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.errors import RequestError, unknown
from sparing.core.flops import Call, Product, matmul_flops, register
from sparing.weights.adapter import Adapter, cast
from sparing.weights.factor import Factor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "swish": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


class Bottleneck(Adapter, abc.ABC):
    """Abstract: ``scale * (up act(down x))`` with biases that are never masked.

    down: (r, d_in), up: (d_out, r); x: (..., d_in) to (..., d_out). Subclasses say what x is and
    where the result goes.
    """

    factors: ClassVar[tuple[str, ...]] = ("down", "up")
    units: ClassVar[tuple[tuple[tuple[str, int], ...], ...]] = ((("down", 0), ("up", 1)),)

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor,
        up_bias: Tensor,
        *,
        activation: str,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        self.down, self.up = Factor(down), Factor(up)
        self.down_bias = nn.Parameter(down_bias.detach().clone())
        self.up_bias = nn.Parameter(up_bias.detach().clone())
        self.activation, self.scale, self.dropout = activation, float(scale), float(dropout)

    @classmethod
    def fresh(
        cls,
        sizes: tuple[int, int],
        *,
        width: int,
        activation: str,
        scale: float,
        dropout: float,
        zero_start: bool,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> Bottleneck:
        """Kaiming down and zero up, so that nothing changes at the start.

        Without ``zero_start`` both are N(0, 0.02), as in BERT and the published sparse adapters.
        """
        into, out = sizes
        down, up = torch.empty(width, into), torch.zeros(out, width)
        if zero_start:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        else:
            for factor in (down, up):
                factor.normal_(std=0.02, generator=generator)
        parts = [down, up, torch.zeros(width), torch.zeros(out)]
        return cls(
            *(part.to(device=device, dtype=dtype) for part in parts),
            activation=activation,
            scale=scale,
            dropout=dropout,
        )

    def config(self) -> dict[str, Any]:
        return {"activation": self.activation, "scale": self.scale, "dropout": self.dropout}

    def forward(self, x: Tensor) -> Tensor:
        down = self.down.matrix()
        hidden = F.linear(cast(x, down), down, self.down_bias)
        hidden = ACTIVATIONS[self.activation](hidden)
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        out = F.linear(hidden, self.up.matrix(), self.up_bias)
        return (out if self.scale == 1.0 else out * self.scale).to(x.dtype)

    @torch.no_grad()
    def shrunk_(self, group: int, units: Tensor) -> None:
        self.down_bias.grad = None
        self.down_bias.data = self.down_bias.data.index_select(0, units.to(self.down_bias.device))


@final
class Sequential(Bottleneck):
    """``y + adapter(y)`` on what a module gives: a tensor, or a tuple whose first is one."""

    kind: ClassVar[str] = "sequential"

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if isinstance(output, tuple):
            return (output[0] + self(output[0]), *output[1:])
        return output + self(output)


@final
class InsideNorm(Bottleneck):
    """Pfeiffer's place after a post-norm block: ``norm(z + adapter(norm(z)))``.

    z is the sum of block and residual that the adapted norm takes. The norm is computed twice.
    """

    kind: ClassVar[str] = "inside-norm"

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        z = args[0] if args else next(iter(kwargs.values()))
        # forward, not a call: a call would come back here
        return module.forward(z + self(output))


@final
class Parallel(Bottleneck):
    """``y + scale * adapter(x)`` beside a module that gives y for x."""

    kind: ClassVar[str] = "parallel"

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, tuple):
            return (output[0] + self(x), *output[1:])
        return output + self(x)


@final
class ParallelResidual(Bottleneck):
    """Parallel to a feed-forward block that is split in two modules, as BERT's is.

    The second takes (hidden, x) and adds x itself: giving it ``x + scale * adapter(x)`` instead is
    the same sum, without keeping x between two calls.
    """

    kind: ClassVar[str] = "parallel-residual"

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > 1:
            return (args[0], args[1] + self(args[1]), *args[2:]), kwargs
        if "input_tensor" not in kwargs:
            raise RequestError(f"{type(module).__name__} was called without the input of its block")
        x = kwargs["input_tensor"]
        return args, {**kwargs, "input_tensor": x + self(x)}


BOTTLENECKS: dict[str, type[Bottleneck]] = {
    cls.kind: cls for cls in (Sequential, InsideNorm, Parallel, ParallelResidual)
}


def _formula(call: Call) -> list[Product]:
    module, x = call.module, call.x
    (r, into), (out, _) = module.down.shape, module.up.shape
    rows = x.numel() // into
    down, up = module.down.values.requires_grad, module.up.values.requires_grad
    needs = x.requires_grad or down or module.down_bias.requires_grad
    return [
        Product(matmul_flops(rows, into, r), x.requires_grad + down),
        Product(matmul_flops(rows, r, out), needs + up),
    ]


register(Bottleneck, _formula)
