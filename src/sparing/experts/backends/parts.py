"""What every backend takes and gives: the rows, the nets, and the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The routing as a backend sees it: R rows, sorted by expert.

    tokens: (R,) int64; weights: (R,) floating; counts: (E,) int64; k: (T,) int64.
    """

    tokens: Tensor
    weights: Tensor
    counts: Tensor
    k: Tensor


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Nets:
    """E stacked feed-forward nets of width f: gated if ``gate`` is given.

    gate: (E, f, d) or None, up: (E, f, d), up_bias: (E, f) or None,
    down: (E, o, f), down_bias: (E, o) or None.
    """

    gate: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: str

    def to(self, dtype: torch.dtype) -> Nets:
        """The nets in another dtype, differentiable."""
        return Nets(
            gate=None if self.gate is None else self.gate.to(dtype),
            up=self.up.to(dtype),
            up_bias=None if self.up_bias is None else self.up_bias.to(dtype),
            down=self.down.to(dtype),
            down_bias=None if self.down_bias is None else self.down_bias.to(dtype),
            activation=self.activation,
        )


class Forward(NamedTuple):
    """Outputs, and what the backward pass needs; what was not asked for has no elements.

    y: (T, o); a: (R, f) input of the activation; b: (R, f) what the activation is multiplied by
    (gated nets only); rows: (R, o) unweighted outputs; sums: (E, o) their sums by expert.
    """

    y: Tensor
    a: Tensor
    b: Tensor
    rows: Tensor
    sums: Tensor


class Needs(NamedTuple):
    """Which gradients are wanted: of the tokens, of the routing weights, of the nets."""

    x: bool
    weights: bool
    nets: bool


class Grads(NamedTuple):
    """Gradients of a layer's inputs, in their dtypes; what is not wanted has no elements."""

    x: Tensor
    weights: Tensor
    gate: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


def like(reference: Tensor, wanted: bool, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on the device of ``reference``; (0,) if it is not wanted."""
    return torch.empty(
        shape if wanted else (0,), dtype=dtype or reference.dtype, device=reference.device
    )


def combine(rows: Tensor, tokens: Tensor, k: Tensor, weights: Tensor | None) -> Tensor:
    """Sum by token: (R, n) rows, times their weights (R,), become (T, n).

    One weighted bag of rows per token: the order of the sum is fixed, so that the result is the
    same each time. Accumulates and returns at least single precision.
    """
    total = k.shape[0]
    wide = rows if rows.dtype == torch.float64 else rows.float()
    if not tokens.shape[0]:
        return wide.new_zeros(total, rows.shape[1])
    offsets = torch.zeros(total + 1, dtype=torch.int64, device=k.device)
    torch.cumsum(k, 0, out=offsets[1:])
    order = tokens.argsort(stable=True)
    return torch.embedding_bag(
        wide,
        order,
        offsets,
        mode=0,
        per_sample_weights=None if weights is None else weights.to(wide.dtype)[order],
        include_last_offset=True,
    )[0]
