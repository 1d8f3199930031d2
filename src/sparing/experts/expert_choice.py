"""Expert choice: in training experts take tokens (Zhou et al. 2022, arXiv 2202.09368).

Training is not causal: whether an expert takes a token depends on the other tokens of the batch,
later ones of the same text included. Evaluation is: each token is routed by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from sparing.core.checks import require_number
from sparing.core.errors import RequestError
from sparing.core.ranks import sum_
from sparing.core.recompute import add_once_
from sparing.experts import losses
from sparing.experts.fixed_k import ScoredOptions
from sparing.experts.losses import LossWeights
from sparing.experts.method import RoutedExperts
from sparing.experts.router import Router, exact, normal_, scores_of
from sparing.experts.routing import Routing
from sparing.experts.selection import top_k_map

DECAY = 0.99
"""Of the running mean of cut-offs, once it has seen 1 / (1 - DECAY) optimizer steps."""


@final
@dataclass(frozen=True, kw_only=True)
class ExpertChoiceOptions(ScoredOptions):
    """Options of expert choice; see ScoredOptions. It needs no balance loss: loads are equal.

    k: mean experts per token (the paper's capacity factor): of T tokens each of E experts takes
    T k / E, rounded. fallback: how a token is routed in evaluation, by itself: to the experts for
    which it passes the ``threshold`` that their last tokens in training passed on average, so
    that tokens differ in their number of experts as they did there; or to its ``top-k`` experts,
    k rounded. Before the first optimizer step it is top-k in any case.
    """

    router_name: ClassVar[str] = "expert choice"
    known_losses: ClassVar[tuple[str, ...]] = ("z",)

    k: float = 2.0
    fallback: Literal["threshold", "top-k"] = "threshold"
    losses: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("k", self.k)
        if not 0 < self.k <= self.experts:
            raise RequestError(
                f"k must be above 0 and at most experts ({self.experts}), got {self.k}"
            )
        if self.fallback not in ("threshold", "top-k"):
            raise RequestError(f'fallback must be "threshold" or "top-k", got "{self.fallback}"')


@final
class ExpertChoiceRouter(Router):
    """The router module; see ExpertChoiceOptions. Not causal in training.

    threshold: (E,), the running mean of the lowest score that each expert took in training;
    updates: (), optimizer steps that it has seen. Both are buffers, equal on all ranks.
    """

    causal: ClassVar[bool] = False
    threshold: Tensor
    updates: Tensor

    def __init__(self, dim: int, options: ExpertChoiceOptions, seed: int = 0) -> None:
        super().__init__(dim, options.experts)
        self.options = options
        normal_(self.similarity, torch.Generator().manual_seed(seed))
        self.register_buffer("threshold", torch.zeros(options.experts))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # since the last step, as a layer's record: cut-offs summed over passes, and the passes
        self._sums = torch.zeros(options.experts + 1, dtype=torch.float64)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            x = exact(x)
            logits = scores_of(x, self)
            score = logits.masked_fill(~self.active, -torch.inf).softmax(1)
            real = torch.ones_like(score[:, 0], dtype=torch.bool) if mask is None else mask
            auxiliary = {}
            if self.training:
                chosen = self._experts_choose(score.detach(), real)
                if self.options.losses.z:
                    z = losses.z(logits, self.active, mask)
                    auxiliary["z"] = self.options.losses.weigh("z", z)
            else:
                chosen = self._each_token_alone(score.detach()) & real[:, None]
            routing = Routing.from_map(chosen, score, auxiliary)
            routing.unserved = ~chosen.any(1) & real
            return routing

    def capacity(self, tokens: Tensor) -> Tensor:
        """Tokens that each active expert takes of so many, () int64: at least 1, at most all."""
        alive = self.active.sum().double()
        each = (tokens * alive.clamp_max(self.options.k) / alive + 0.5).floor().long()
        return torch.minimum(each.clamp_min(1), tokens)

    def _experts_choose(self, score: Tensor, real: Tensor) -> Tensor:
        """The map of a training batch: each active expert's best tokens, ties to the first."""
        each = self.capacity(real.sum())
        taken = top_k_map(score.t(), each.expand(self.slots_count), real).t() & self.active
        if self._sums.device != score.device:
            self._sums = self._sums.to(score.device)
        if score.shape[0]:
            lowest = torch.where(taken, score, torch.inf).amin(0)
            # an expert without a token, as all are in a batch of padding, has no cut-off
            lowest = lowest.masked_fill(lowest.isinf(), 0.0)
            add_once_(self._sums, torch.cat([lowest, (each > 0).to(lowest).view(1)]))
        return taken

    def _each_token_alone(self, score: Tensor) -> Tensor:
        chosen = top_k_map(score, max(1, math.floor(self.options.k + 0.5)), self.active)
        if self.options.fallback == "threshold":
            passed = (score >= self.threshold) & self.active
            chosen = torch.where(self.updates > 0, passed, chosen)
        return chosen

    @torch.no_grad()
    def update_thresholds(self, load: Tensor, tokens: Tensor) -> None:
        """Follow the experts' cut-offs; a stated boundary, at which all ranks take part."""
        sum_([self._sums])
        passes = self._sums[-1]
        if passes > 0:
            self.updates += 1
            # a plain mean of the first steps, so that the start at 0 leaves no trace
            keep = min(DECAY, 1 - 1 / int(self.updates))
            now = (self._sums[:-1] / passes).to(self.threshold.dtype)
            moved = keep * self.threshold + (1 - keep) * now
            self.threshold.copy_(torch.where(self.active, moved, self.threshold))
        self._sums.zero_()


@final
class ExpertChoice(RoutedExperts):
    """Each expert takes its best tokens in training, which is not causal; see the module."""

    name: ClassVar[str] = "expert-choice"
    causal: ClassVar[bool] = False
    Options = ExpertChoiceOptions

    def router(self, dim: int, seed: int = 0) -> ExpertChoiceRouter:
        return ExpertChoiceRouter(dim, self.options, seed)

    def touches(self) -> list[str]:
        return [
            *super().touches(),
            "training is not causal: experts choose among all tokens of a batch, later ones too; "
            "evaluation routes each token by itself",
        ]
