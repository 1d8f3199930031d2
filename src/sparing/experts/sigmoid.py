"""Sigmoid top-k with a bias that balances the load without a loss.

Wang et al. 2024 (arXiv 2408.15664, algorithm 1); DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from sparing.core.checks import require_number
from sparing.core.errors import RequestError
from sparing.experts.fixed_k import FixedKRouter, GroupedOptions, Scores
from sparing.experts.losses import LossWeights
from sparing.experts.method import RoutedExperts


@final
@dataclass(frozen=True, kw_only=True)
class SigmoidTopKOptions(GroupedOptions):
    """Options of sigmoid top-k routing; see FixedKOptions and GroupedOptions.

    rate: largest step of an expert's bias after an optimizer step, in units of the score, which
    lies between 0 and 1; 0 leaves the biases where they are. update: every step is ``rate`` up or
    down by the ``sign`` of the load error, or ``proportional`` to the error relative to the mean
    load and at most ``rate``. scale: factor of a token's weights.
    """

    router_name: ClassVar[str] = "sigmoid top-k routing"

    rate: float = 0.001
    update: Literal["sign", "proportional"] = "sign"
    scale: float = 1.0
    losses: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("rate", self.rate, 0)
        require_number("scale", self.scale)
        if not 0 < self.scale < float("inf"):
            raise RequestError(f"scale must be above 0 and finite, got {self.scale}")
        if self.update not in ("sign", "proportional"):
            raise RequestError(f'update must be "sign" or "proportional", got "{self.update}"')


@final
class SigmoidTopKRouter(FixedKRouter):
    """The router module; see SigmoidTopKOptions.

    bias: (E,), added to the scores for the choice alone; a buffer, so that it is saved with the
    model and no optimizer moves it. It averages 0 over the active experts.
    """

    bias: Tensor

    def __init__(self, dim: int, options: SigmoidTopKOptions, seed: int = 0) -> None:
        super().__init__(
            dim,
            slots=options.experts,
            k=options.k,
            normalize=bool(options.normalize),
            weights=options.losses,
            groups=options.limit(),
            scale=options.scale,
            seed=seed,
        )
        self.options = options
        self.register_buffer("bias", torch.zeros(options.experts))

    def scores(self, x: Tensor) -> Scores:
        logits = self.logits(x)
        score = torch.sigmoid(logits)
        return Scores(logits, score, ranking=score.detach() + self.bias)

    @torch.no_grad()
    def update_thresholds(self, load: Tensor, tokens: Tensor) -> None:
        """Raise the bias of experts below the mean load, lower it of those above.

        load: (E,), tokens: (), both since the last optimizer step and summed over ranks. The mean
        over active experts is then taken off, which changes no choice among them and keeps the
        biases from drifting together.
        """
        if tokens <= 0 or not self.options.rate:
            return
        mean = load[self.active].double().mean()
        error = mean - load.double()
        if self.options.update == "sign":
            step = error.sign()
        else:
            step = (error / mean.clamp_min(1e-12)).clamp(-1.0, 1.0)
        moved = self.bias + self.options.rate * step.to(self.bias.dtype)
        moved = moved - moved[self.active].mean()
        self.bias.copy_(torch.where(self.active, moved, self.bias))


@final
class SigmoidTopK(RoutedExperts):
    """Each token takes its k best by sigmoid score plus a bias that follows the load."""

    name: ClassVar[str] = "sigmoid-top-k"
    Options = SigmoidTopKOptions

    def router(self, dim: int, seed: int = 0) -> SigmoidTopKRouter:
        return SigmoidTopKRouter(dim, self.options, seed)
