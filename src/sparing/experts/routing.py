"""Which expert takes which token: one list of rows, sorted by expert."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sparing.core.errors import RequestError


@final
class Routing:
    """The assignments of T tokens to E experts as R compressed rows, expert-major.

    Rows are sorted by expert, and within an expert by token; R varies from batch to batch and is
    exactly the number of (token, expert) pairs: nothing is padded and nothing dropped.

    Made of a map: chosen: (T, E) bool, and shares: (T, E) float, weights that are read (and given
    gradient) only where chosen.

    tokens: (R,) int64, experts: (R,) int64, weights: (R,) float, differentiable,
    counts: (E,) int64, rows of each expert, k: (T,) int64, experts of each token,
    losses: auxiliary losses by name, scalars with gradient, times their coefficients;
    unserved: (T,) bool, real tokens that no gate opened for (before any fallback), or None;
    closed: (T, E) float, weights whose gradient is wanted where no row exists, or None
    (see ``credit_closed_gates``);
    bypass: (T, d) float, what null experts add to the output beside the rows, or None;
    most: how many experts a token takes at most, if the router fixes that, or None.
    """

    def __init__(
        self, chosen: Tensor, shares: Tensor, losses: dict[str, Tensor] | None = None
    ) -> None:
        if chosen.shape != shares.shape or chosen.ndim != 2:
            raise RequestError(
                f"the map and the weights must both be (tokens, experts), got "
                f"{tuple(chosen.shape)} and {tuple(shares.shape)}"
            )
        self.chosen, self.shares = chosen, shares
        self.losses = losses or {}
        self.unserved: Tensor | None = None
        self.closed: Tensor | None = None
        self.bypass: Tensor | None = None
        self.most: int | None = None
        self._by_expert = chosen.t().contiguous()
        self.counts = self._by_expert.sum(1)
        self.k = chosen.sum(1)
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None
        # a graph without gradient computes from the map; rows, of which it cannot know how many
        # there are, would be built in it whether it uses them or not
        if torch.is_grad_enabled() or not torch.compiler.is_compiling():
            self._build()

    def _build(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._rows is None:
            # no sort: the transposed map's non-zeros are already expert-major and token-stable
            experts, tokens = self._by_expert.nonzero(as_tuple=True)
            # masked_select keeps that order, and its backward is a scatter without conflicts
            self._rows = tokens, experts, torch.masked_select(self.shares.t(), self._by_expert)
        return self._rows

    @property
    def tokens(self) -> Tensor:
        """The token of each row, (R,) int64."""
        return self._build()[0]

    @property
    def experts(self) -> Tensor:
        """The expert of each row, (R,) int64."""
        return self._build()[1]

    @property
    def weights(self) -> Tensor:
        """The weight of each row, (R,) float."""
        return self._build()[2]

    @property
    def rows(self) -> int:
        """R, the number of (token, expert) pairs."""
        return int(self.tokens.shape[0])
