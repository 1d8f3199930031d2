"""LoRA: a frozen matrix plus a trained product of two thin ones (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.core.flops import Call, Product, matmul_flops, register
from sparing.weights.adapter import Adapter, cast
from sparing.weights.factor import Factor


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a module that multiplies by one matrix: ``nn.Linear`` or GPT-2's ``Conv1D``."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if transposed(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def transposed(module: nn.Module) -> bool:
    """Whether the module keeps its weight as (in, out): transformers' ``Conv1D``, not imported."""
    return any(
        (base.__module__, base.__qualname__) == ("transformers.pytorch_utils", "Conv1D")
        for base in type(module).__mro__
    )


@final
class LoRA(Adapter):
    """``y + alpha / r * B A x``: a is (r, in), b is (out, r); x: (..., in), y: (..., out)."""

    kind: ClassVar[str] = "lora"
    factors: ClassVar[tuple[str, ...]] = ("a", "b")
    units: ClassVar[tuple[tuple[tuple[str, int], ...], ...]] = ((("a", 0), ("b", 1)),)
    mergeable: ClassVar[bool] = True

    def __init__(self, a: Tensor, b: Tensor, *, scaling: float, dropout: float = 0.0) -> None:
        """``dropout`` on x in training draws from torch's generator, as all dropout layers do.

        Only that one is restored when activation checkpointing computes a block again.
        """
        super().__init__()
        self.a, self.b = Factor(a), Factor(b)
        self.scaling, self.dropout = float(scaling), float(dropout)

    @staticmethod
    def fresh(
        module: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        zero_start: bool,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> LoRA:
        """A is Kaiming uniform and B zero; without ``zero_start`` both are N(0, 0.02)."""
        known = sizes(module)
        if known is None:
            raise RequestError(f"LoRA adapts linear layers, not a {type(module).__name__}")
        width, out = known
        a, b = torch.empty(rank, width), torch.zeros(out, rank)
        if zero_start:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        else:
            for factor in (a, b):
                factor.normal_(std=0.02, generator=generator)
        device = next(module.parameters()).device
        a, b = (factor.to(device=device, dtype=dtype) for factor in (a, b))
        return LoRA(a, b, scaling=alpha / rank, dropout=dropout)

    def config(self) -> dict[str, Any]:
        return {"scaling": self.scaling, "dropout": self.dropout}

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a.matrix(), self.b.matrix()
        x = cast(x, a)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return F.linear(F.linear(x, a), b) * self.scaling

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        return output + self(x).to(output.dtype)

    def delta(self, module: nn.Module) -> Tensor:
        whole = self.b.matrix() @ self.a.matrix() * self.scaling
        return whole.T if transposed(module) else whole


def _formula(call: Call) -> list[Product]:
    module, x = call.module, call.x
    (r, width), (out, _) = module.a.shape, module.b.shape
    rows = x.numel() // width
    return [
        Product(matmul_flops(rows, width, r), x.requires_grad + module.a.values.requires_grad),
        Product(matmul_flops(rows, r, out), 1 + module.b.values.requires_grad),
    ]


register(LoRA, _formula)
