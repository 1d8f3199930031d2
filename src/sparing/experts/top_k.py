"""Softmax top-k routing (Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2022), dropless.

Limited to a token's best groups of experts on request (DeepSeek-V2, arXiv 2405.04434).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from sparing.experts.fixed_k import FixedKRouter, GroupedOptions, Scores
from sparing.experts.method import RoutedExperts


@final
@dataclass(frozen=True, kw_only=True)
class TopKOptions(GroupedOptions):
    """Options of top-k routing; see FixedKOptions and GroupedOptions."""

    router_name: ClassVar[str] = "top-k routing"


@final
class TopKRouter(FixedKRouter):
    """The router module; see TopKOptions."""

    def __init__(self, dim: int, options: TopKOptions, seed: int = 0) -> None:
        super().__init__(
            dim,
            slots=options.experts,
            k=options.k,
            normalize=bool(options.normalize),
            weights=options.losses,
            groups=options.limit(),
            seed=seed,
        )
        self.options = options

    def scores(self, x: Tensor) -> Scores:
        logits = self.logits(x)
        return Scores(logits, self.alive(logits).softmax(1))


@final
class TopK(RoutedExperts):
    """The usual sparse experts: each token takes its k best by softmax score."""

    name: ClassVar[str] = "top-k"
    Options = TopKOptions

    @property
    def slots(self) -> int:
        return int(self.options.experts)

    @property
    def expected_k(self) -> float:
        return float(self.options.k)

    def router(self, dim: int, seed: int = 0) -> TopKRouter:
        return TopKRouter(dim, self.options, seed)
