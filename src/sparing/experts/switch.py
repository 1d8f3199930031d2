"""Switch routing: one expert for each token (Fedus et al. 2022, arXiv 2101.03961), dropless."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from sparing.core.checks import require_number
from sparing.experts.fixed_k import FixedKRouter, ScoredOptions, Scores
from sparing.experts.method import RoutedExperts
from sparing.experts.noise import Noise


@final
@dataclass(frozen=True, kw_only=True)
class SwitchOptions(ScoredOptions):
    """Options of Switch routing; see ScoredOptions.

    jitter: in training the router sees each input feature times a number drawn uniformly from
    1 - jitter to 1 + jitter (the paper's table 11); the experts see it as it is.
    """

    router_name: ClassVar[str] = "Switch routing"

    jitter: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("jitter", self.jitter, 0, 1)

    @property
    def k(self) -> int:
        """One expert for each token, always."""
        return 1


@final
class SwitchRouter(FixedKRouter):
    """The router module; see SwitchOptions. The weight is the chosen expert's probability."""

    def __init__(self, dim: int, options: SwitchOptions, seed: int = 0) -> None:
        super().__init__(
            dim, slots=options.experts, k=1, normalize=False, weights=options.losses, seed=seed
        )
        self.options = options
        self.noise = Noise(seed)

    def scores(self, x: Tensor) -> Scores:
        jitter = self.options.jitter
        if self.training and jitter:
            x = x * (1 - jitter + 2 * jitter * self.noise.uniform(x, self.dim))
        logits = self.logits(x)
        return Scores(logits, self.alive(logits).softmax(1))


@final
class Switch(RoutedExperts):
    """Each token takes its best expert, weighted by the probability that the router gives it."""

    name: ClassVar[str] = "switch"
    Options = SwitchOptions

    @property
    def expected_k(self) -> float:
        return 1.0

    def router(self, dim: int, seed: int = 0) -> SwitchRouter:
        return SwitchRouter(dim, self.options, seed)
