"""Which expert takes which token: one list of rows, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from sparing.core.errors import RequestError


@final
@dataclass(slots=True)
class Routing:
    """The assignments of T tokens to E experts as R compressed rows, expert-major.

    Rows are sorted by expert, and within an expert by token; R varies from batch to batch and is
    exactly the number of (token, expert) pairs: nothing is padded and nothing dropped.

    tokens: (R,) int64, experts: (R,) int64, weights: (R,) float, differentiable,
    counts: (E,) int64, rows of each expert, k: (T,) int64, experts of each token,
    losses: auxiliary losses by name, scalars with gradient, times their coefficients;
    unserved: (T,) bool, real tokens that no gate opened for (before any fallback), or None;
    closed: (T, E) float, weights whose gradient is wanted where no row exists, or None
    (see ``credit_closed_gates``);
    bypass: (T, d) float, what null experts add to the output beside the rows, or None;
    chosen: (T, E) bool and shares: (T, E) float, the map that the rows were built from and the
    weights where it is true, or None: a compiled graph without gradient computes from them.
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor
    counts: Tensor
    k: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    unserved: Tensor | None = None
    closed: Tensor | None = None
    bypass: Tensor | None = None
    chosen: Tensor | None = None
    shares: Tensor | None = None

    @property
    def rows(self) -> int:
        """R, the number of (token, expert) pairs."""
        return int(self.tokens.shape[0])

    @staticmethod
    def from_map(
        chosen: Tensor, weights: Tensor, losses: dict[str, Tensor] | None = None
    ) -> Routing:
        """Build the rows of a boolean map.

        chosen: (T, E) bool; weights: (T, E) float, read (and given gradient) only where chosen.
        No sort: the transposed map's non-zeros are already expert-major and token-stable.
        """
        if chosen.shape != weights.shape or chosen.ndim != 2:
            raise RequestError(
                f"the map and the weights must both be (tokens, experts), got "
                f"{tuple(chosen.shape)} and {tuple(weights.shape)}"
            )
        by_expert = chosen.t().contiguous()
        experts, tokens = by_expert.nonzero(as_tuple=True)
        return Routing(
            tokens=tokens,
            experts=experts,
            # masked_select keeps the same order, and its backward is a scatter without conflicts
            weights=torch.masked_select(weights.t(), by_expert),
            counts=by_expert.sum(1),
            k=chosen.sum(1),
            losses=losses or {},
            chosen=chosen,
            shares=weights,
        )
