"""Top-p routing: a token takes experts until their probabilities add up to p.

Huang et al. 2024, *Harder Tasks Need More Experts* (arXiv 2403.07652), section 3, and its released
code (github.com/ZhenweiAn/Dynamic_MoE): the entropy loss keeps tokens from taking all experts. The
controller of p that holds a mean number of experts instead is the idea of DTop-p (arXiv
2512.13996), here with one p for each layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.experts import losses
from sparing.experts.calibration import WIDEST, calibrate
from sparing.experts.losses import LossWeights
from sparing.experts.method import RoutedExperts, nested
from sparing.experts.null import NullExperts, NullOptions
from sparing.experts.router import Router, exact, normal_
from sparing.experts.routing import Routing


@final
@dataclass(frozen=True, kw_only=True)
class TopPOptions(NullOptions):
    """Options of top-p routing.

    experts: in each layer. p: probability in (0, 1] that a token's experts must pass together; 1
    takes all of them, next to 0 the best one. max_k: most experts of a token, None for no limit.
    normalize: whether a token's weights sum to 1, or are the raw probabilities as published.
    target_k: mean experts per token to hold by moving p after each optimizer step; p then starts
    where the first ``calibration`` training batches take that many (0 batches: at ``p``).
    proportional, integral: the controller's gains, in logits of p per relative error of k.
    losses: ``entropy`` (default 1e-4 without target_k), ``balance`` (default 0.01), ``z``.
    With null experts, p and max_k count them too and target_k does not: see NullOptions.
    """

    experts: int = 8
    p: float = 0.4
    max_k: int | None = None
    normalize: bool = False
    target_k: float | None = None
    proportional: float = 0.1
    integral: float = 0.3
    calibration: int = 4
    losses: LossWeights | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("experts", self.experts, 1)
        require_number("p", self.p, 0, 1)
        if self.p == 0:
            raise RequestError("p must be above 0; a small p takes the best expert alone")
        most = self.experts
        if self.max_k is not None:
            require_whole("max_k", self.max_k, 1)
            allowed = self.experts + self.null_experts
            if self.max_k > allowed:
                raise RequestError(f"max_k must be at most experts ({allowed}), got {self.max_k}")
            most = min(most, self.max_k)
        self.check_null_weights(self.normalize)
        require_number("proportional", self.proportional, 0)
        require_number("integral", self.integral, 0)
        require_whole("calibration", self.calibration, 0)
        if self.target_k is not None:
            require_number("target_k", self.target_k, 0 if self.null_experts else 1, most)
            if self.target_k == 0:
                raise RequestError("target_k must be above 0")
        chosen = LossWeights(balance=0.01, entropy=1e-4 if self.target_k is None else 0.0)
        if self.losses is not None:
            chosen = nested("losses", self.losses, LossWeights)
        object.__setattr__(self, "losses", chosen)
        chosen.require("top-p routing", ("balance", "entropy", "z"))


@final
class TopPRouter(Router):
    """The router module; see TopPOptions.

    level: (), the logit of p where a target_k moves it; error: (), the last relative error of k.
    """

    steers_each = False
    level: Tensor
    error: Tensor
    calibrated: Tensor

    def __init__(self, dim: int, options: TopPOptions, seed: int = 0) -> None:
        super().__init__(dim, options.experts)
        self.options = options
        generator = torch.Generator().manual_seed(seed)
        normal_(self.similarity, generator)
        self.null = NullExperts(dim, options, generator) if options.null_experts else None
        if options.target_k is not None:
            start = torch.logit(torch.tensor(float(options.p))).clamp(-WIDEST, WIDEST)
            self.register_buffer("level", start)
            self.register_buffer("error", torch.zeros(()))
            self.register_buffer("calibrated", torch.zeros((), dtype=torch.int64))

    @property
    def products(self) -> int:
        return self.slots_count + (self.null.products if self.null else 0)

    @property
    def p(self) -> Tensor:
        """(), the probability to pass now."""
        if self.options.target_k is None:
            return torch.tensor(float(self.options.p), device=self.similarity.device)
        return exact(self.level).sigmoid()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(exact(x), exact(self.similarity))
            live = self.active
            if self.null is not None:
                logits, live = self.null.join(x, logits, live)
            score = logits.masked_fill(~live, -torch.inf).softmax(1)
            below = before(score.detach())
            chosen = self._choose(score, below, self._p(below, mask)) & live
            if mask is not None:
                chosen = chosen & mask[:, None]
            weights = score
            if self.options.normalize and self.null is not None:
                weights = self.null.normalize(score, chosen)
            elif self.options.normalize:
                kept = score * chosen
                total = kept.sum(1, keepdim=True)
                weights = kept / torch.where(total > 0, total, torch.ones_like(total))
            auxiliary = self._losses(logits, score, chosen, live, mask) if self.training else {}
            if self.null is not None:
                return self.null.route(x, chosen, weights, auxiliary)
            return Routing.from_map(chosen, weights, auxiliary)

    def _p(self, below: Tensor, mask: Tensor | None) -> Tensor | float:
        """The probability to pass in this forward.

        Expert e of a token is taken exactly if the probability before it, below: (T, E), is at
        most p: the p that takes k of E on average is the k/E quantile of these, where it starts.
        """
        target = self.options.target_k
        if target is None:
            return self.options.p
        if not self.training:
            return self.p
        level = calibrate(
            below[:, : self.slots_count],
            mask,
            self.level,
            self.calibrated,
            self.active,
            rule="together",
            wanted=target,
            batches=self.options.calibration,
        )
        return exact(level).sigmoid()

    def _choose(self, score: Tensor, below: Tensor, p: Tensor | float) -> Tensor:
        """(T, E) bool: up to and including the expert whose cumulative probability passes p."""
        if isinstance(p, Tensor) or p < 1:
            chosen = below <= p
        else:
            chosen = torch.ones_like(below, dtype=torch.bool)  # whatever the sums round to
        if self.options.max_k is not None:
            k = min(self.options.max_k, score.shape[1])
            best = score.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
            chosen &= torch.zeros_like(chosen).scatter_(1, best, True)
        return chosen

    def _losses(
        self, logits: Tensor, score: Tensor, chosen: Tensor, live: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        weight = self.options.losses
        assert weight is not None
        found: dict[str, Tensor] = {}
        if weight.balance:
            null = self.options.null_experts
            value = losses.balance(score, chosen, live, mask, null=null)
            found["balance"] = weight.weigh("balance", value)
        if weight.entropy:
            found["entropy"] = weight.weigh("entropy", losses.entropy(logits, live, mask))
        if weight.z:
            found["z"] = weight.weigh("z", losses.z(logits, live, mask))
        return found

    @torch.no_grad()
    def update_thresholds(self, load: Tensor, tokens: Tensor) -> None:
        """Move p so that the mean number of experts per token comes to ``target_k``.

        load: (E,), tokens: (), since the last optimizer step and summed over ranks. A controller
        with proportional and integral terms in the form of increments, so that bounding the logit
        of p bounds the integral too.
        """
        target = self.options.target_k
        if target is None or tokens <= 0:
            return
        error = ((target - load.sum() / tokens) / target).clamp(-1.0, 1.0).to(self.level)
        change = self.options.proportional * (error - self.error) + self.options.integral * error
        self.level.copy_((self.level + change).clamp(-WIDEST, WIDEST))
        self.error.copy_(error)


def before(score: Tensor) -> Tensor:
    """(T, E): the sum of the probabilities that come before each expert's, in descending order.

    Equal probabilities come in the order of their experts.
    """
    ordered, order = score.sort(dim=1, descending=True, stable=True)
    exclusive = torch.zeros_like(score)
    exclusive[:, 1:] = ordered[:, :-1].cumsum(1)
    return torch.empty_like(score).scatter_(1, order, exclusive)


@final
class TopP(RoutedExperts):
    """Experts whose number follows the router's confidence: few where it is sure, else more."""

    name: ClassVar[str] = "top-p"
    Options = TopPOptions

    @property
    def expected_k(self) -> float:
        if self.options.target_k is not None:
            return float(self.options.target_k)
        # as training starts: logits of tokens of unit variance are standard normal
        null, most = self.options.null_experts, self.options.max_k
        random = torch.randn(4096, self.slots + null, generator=torch.Generator().manual_seed(0))
        k = (before(random.softmax(1)) <= self.options.p).sum(1).double()
        k = k.clamp_max(math.inf if most is None else most)
        return float(k.mean().item() * self.slots / (self.slots + null))

    def router(self, dim: int, seed: int = 0) -> TopPRouter:
        return TopPRouter(dim, self.options, seed)
