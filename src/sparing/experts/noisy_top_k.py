"""Noisy top-k routing (Shazeer et al. 2017, arXiv 1701.06538, section 2.1 and appendix A)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.checks import require_number
from sparing.experts import losses
from sparing.experts.fixed_k import FixedKOptions, FixedKRouter, Scores
from sparing.experts.losses import LossWeights
from sparing.experts.method import RoutedExperts
from sparing.experts.noise import Noise
from sparing.experts.router import exact


@final
@dataclass(frozen=True, kw_only=True)
class NoisyTopKOptions(FixedKOptions):
    """Options of noisy top-k routing; see FixedKOptions.

    noise_floor: least standard deviation of the noise, added to what is learned.
    """

    router_name: ClassVar[str] = "noisy top-k routing"
    known_losses: ClassVar[tuple[str, ...]] = ("importance", "load", "z")

    noise_floor: float = 0.01
    losses: LossWeights = field(default_factory=lambda: LossWeights(importance=0.01, load=0.01))

    def __post_init__(self) -> None:
        super().__post_init__()
        # the load estimate divides by the standard deviation
        require_number("noise_floor", self.noise_floor, 1e-6)


@final
class NoisyTopKRouter(FixedKRouter):
    """The router module; see NoisyTopKOptions.

    spread: (E, d), the noise of expert e on a token x has standard deviation
    softplus(<spread_e, x>) + noise_floor (equation 4).
    """

    def __init__(self, dim: int, options: NoisyTopKOptions, seed: int = 0) -> None:
        super().__init__(
            dim,
            slots=options.experts,
            k=options.k,
            normalize=bool(options.normalize),
            weights=options.losses,
            seed=seed,
        )
        self.options = options
        self.spread = nn.Parameter(torch.zeros(options.experts, dim))
        self.noise = Noise(seed)

    def slots(self) -> dict[str, nn.Parameter]:
        return {"similarity": self.similarity, "spread": self.spread}

    def flops(self, tokens: int) -> int:
        return 2 * super().flops(tokens)

    def scores(self, x: Tensor) -> Scores:
        logits = self.logits(x)
        if not self.training:
            return Scores(logits, self.alive(logits).softmax(1))
        spread = F.softplus(F.linear(x, exact(self.spread))) + self.options.noise_floor
        noisy = logits + spread * self.noise.normal(x, self.slots_count)
        # softmax over the k chosen is the renormalised softmax over all
        return Scores(logits, self.alive(noisy).softmax(1), noisy=noisy, spread=spread)

    def loss(self, name: str, found: Scores, chosen: Tensor, mask: Tensor | None) -> Tensor:
        if name == "importance":
            return losses.importance(self.weigh(found.score, chosen), self.active, mask)
        if name == "load":
            assert found.noisy is not None
            assert found.spread is not None
            likely = losses.chance_of_top_k(
                found.logits, found.noisy, found.spread, self.k, self.active
            )
            return losses.load(likely, self.active, mask)
        return super().loss(name, found, chosen, mask)


@final
class NoisyTopK(RoutedExperts):
    """Each token takes its k best experts by logits that carry learned noise in training."""

    name: ClassVar[str] = "noisy-top-k"
    Options = NoisyTopKOptions

    def router(self, dim: int, seed: int = 0) -> NoisyTopKRouter:
        return NoisyTopKRouter(dim, self.options, seed)
