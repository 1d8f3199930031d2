"""Top-any routing: every token opens the gates of as many experts as it needs.

DynMoE (Guo et al. 2024, arXiv 2405.14297). A gate opens where the cosine of token and expert
passes the expert's own threshold. ``published=True`` is the rule of the released code
(github.com/LINs-lab/DynMoE); the default corrects it, see docs/methods/dynmoe.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.experts import losses
from sparing.experts.calibration import calibrate
from sparing.experts.controller import ControllerOptions
from sparing.experts.gates import open_gates
from sparing.experts.losses import LossWeights
from sparing.experts.method import ExpertOptions, RoutedExperts, nested
from sparing.experts.router import Router, exact, orthogonal_rows_
from sparing.experts.routing import Routing

PUBLISHED_LOSSES = LossWeights(diversity=0.01, simplicity=0.01, balance=0.01, efficiency=0.01)

KNOWN_LOSSES = ("diversity", "simplicity", "balance", "z", "efficiency", "target_k")

CHOICES = {
    "weights": ("score", "softmax", "uniform"),
    "closed_gates": ("zero", "mean", "none"),
    "control": ("threshold", "loss"),
}


@final
@dataclass(frozen=True, kw_only=True)
class TopAnyOptions(ExpertOptions):
    """Options of top-any routing.

    max_experts: slots allocated for each layer; start_experts: how many are active at first.
    published: the released rule; it fixes scale, weights, closed_gates, control and fallback.
    scale: factor of the cosine inside the sigmoid; default sqrt(d), which gives the score of a
    random token standard deviation about 1 before the sigmoid.
    weights: of a token's experts: normalised sigmoid ``score``, ``softmax`` over the token's
    experts of the same scaled cosines, or ``uniform`` 1/k.
    closed_gates: what a closed gate is told of the output that was not computed: that it is
    ``zero``, the expert's running ``mean`` output, or ``none`` (no gradient at all). Default
    ``none`` where moving thresholds open gates anyway, else ``zero``.
    start_k: experts per token to start with, by default 2; thresholds start at the quantile of the
    cosines of the first ``calibration`` training batches that gives it. 0 batches: at 0.
    target_k: mean experts per token to hold, or None to let the task decide.
    control: hold the target by moving ``threshold``s without a loss, or by the target_k ``loss``.
    rate: largest threshold step, in standard deviations 1/sqrt(d) of a random cosine.
    adapt: the adaptive number of experts (mapping of ControllerOptions), or None to keep it fixed.
    """

    max_experts: int = 8
    start_experts: int | None = None
    published: bool = False
    scale: float | None = None
    weights: Literal["score", "softmax", "uniform"] | None = None
    closed_gates: Literal["zero", "mean", "none"] | None = None
    start_k: float | None = None
    target_k: float | None = None
    control: Literal["threshold", "loss"] | None = None
    rate: float = 0.1
    calibration: int | None = None
    losses: LossWeights | None = None
    adapt: ControllerOptions | None = field(default_factory=ControllerOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("max_experts", self.max_experts, 1)
        if self.start_experts is not None:
            require_whole("start_experts", self.start_experts, 1)
        if self.start_experts is not None and self.start_experts > self.max_experts:
            raise RequestError(
                f"start_experts must be at most max_experts ({self.max_experts}), "
                f"got {self.start_experts}"
            )
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise RequestError(f'{name} must be one of {", ".join(known)}, got "{value}"')
        if self.scale is not None and not self.scale > 0:
            raise RequestError(f"scale must be above 0, got {self.scale}")
        require_number("rate", self.rate, 0)
        if self.calibration is not None:
            require_whole("calibration", self.calibration, 0)
        if self.start_k is None:
            object.__setattr__(self, "start_k", min(2.0, float(self.max_experts)))
        for name in ("start_k", "target_k"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= self.max_experts:
                raise RequestError(
                    f"{name} must be above 0 and at most max_experts ({self.max_experts}), "
                    f"got {value}"
                )
        released = {
            "weights": "uniform",
            "closed_gates": "none",
            "calibration": 0,
            "losses": PUBLISHED_LOSSES,
            "scale": 1.0,
        }
        if self.target_k is not None and self.control is None:
            object.__setattr__(self, "control", "threshold")
        corrected = {
            "weights": "softmax",
            # a gradient that only guesses is worth its noise where nothing else can open a gate
            "closed_gates": "none" if self.control == "threshold" else "zero",
            "calibration": 4,
            # without diversity rows turn alike: tokens open all gates or none
            "losses": LossWeights(diversity=0.1, balance=0.01 if self.target_k is None else 0.0),
        }
        for name, kind in (("losses", LossWeights), ("adapt", ControllerOptions)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, nested(name, getattr(self, name), kind))
        if self.published and self.target_k is not None:
            raise RequestError("published=True has no target_k; leave one of the two out")
        for name, value in (released if self.published else corrected).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            elif self.published and name != "losses" and getattr(self, name) != value:
                raise RequestError(
                    f"published=True fixes {name} to {value!r}, got {getattr(self, name)!r}; "
                    "leave one of the two out"
                )
        if self.target_k is None and self.control is not None:
            raise RequestError(f'control="{self.control}" needs a target_k to hold')
        assert self.losses is not None
        self.losses.require("top-any routing", KNOWN_LOSSES)
        if self.losses.target_k and self.control != "loss":
            raise RequestError('the target_k loss needs a target_k and control="loss"')


@final
class TopAnyRouter(Router):
    """The router module; see TopAnyOptions. threshold: (E,), in units of the cosine."""

    def __init__(self, dim: int, options: TopAnyOptions, seed: int = 0) -> None:
        super().__init__(dim, options.max_experts, options.start_experts)
        self.options = options
        self.scale = math.sqrt(dim) if options.scale is None else float(options.scale)
        self.threshold = nn.Parameter(
            torch.zeros(options.max_experts), requires_grad=options.control != "threshold"
        )
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.int64))
        orthogonal_rows_(self.similarity, torch.Generator().manual_seed(seed))

    calibrated: Tensor

    @property
    def tracks_outputs(self) -> bool:
        return self.options.closed_gates == "mean"

    def slots(self) -> dict[str, nn.Parameter]:
        return {"similarity": self.similarity, "threshold": self.threshold}

    def cosine(self, x: Tensor) -> Tensor:
        """(T, d) -> (T, E), the cosine of each token with each slot's row."""
        rows = F.normalize(exact(self.similarity), dim=1)
        norm = x.norm(dim=1, keepdim=True)
        # a token of zeros has no direction: its cosines are 0, and its gradient stays finite
        norm = torch.where(norm > torch.finfo(x.dtype).tiny ** 0.5, norm, 1.0)
        return F.linear(x, rows) / norm

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            x = exact(x)
            cosine = self.cosine(x)
            limit = self._calibrate(cosine, mask) if self.training else self.threshold
            score = torch.sigmoid(self.scale * cosine)
            threshold = torch.sigmoid(self.scale * exact(limit))
            live = self.active.expand_as(score)
            if mask is not None:
                live = live & mask[:, None]
            margin = score - threshold
            # a sigmoid of a large scale rounds to 1, where only cosines still tell above from below
            released = self.options.published
            above = margin > 0 if released else cosine > exact(limit)
            opened = above & live
            hear = not released and self.options.closed_gates != "none"
            gates = open_gates(margin, opened, live if hear else opened)
            real = torch.ones_like(opened[:, 0]) if mask is None else mask
            unserved = ~opened.any(1) & real
            auxiliary = self._losses(score, cosine, gates, opened, mask) if self.training else {}
            level = (score if released else cosine).detach().masked_fill(~live, -2.0)
            return self._route(score, cosine, gates, opened, level, unserved, auxiliary)

    def _route(
        self,
        score: Tensor,
        cosine: Tensor,
        gates: Tensor,
        opened: Tensor,
        level: Tensor,
        unserved: Tensor,
        auxiliary: dict[str, Tensor],
    ) -> Routing:
        chosen = opened
        if not (self.options.published and self.training):
            # the fallback: tokens that no gate opened for take the best expert
            best = level.argmax(1, keepdim=True)
            forced = torch.zeros_like(opened).scatter_(1, best, True) & unserved[:, None]
            chosen = opened | forced
            gates = gates + forced.to(gates.dtype)
        if self.options.published:
            weights = gates / chosen.sum(1, keepdim=True).clamp_min(1)
        else:
            share = gates * self._strength(score, cosine, chosen)
            # padding has no share at all: give it a sum of 1 rather than 0/0
            total = share.sum(1, keepdim=True)
            weights = share / torch.where(total > 0, total, torch.ones_like(total))
        routing = Routing.from_map(chosen, weights, auxiliary)
        routing.unserved = unserved
        if self.training and self.options.closed_gates == "mean":
            routing.closed = weights
        return routing

    def _strength(self, score: Tensor, cosine: Tensor, chosen: Tensor) -> Tensor:
        """What a token's weights are proportional to; (T, E), positive."""
        if self.options.weights == "score":
            return score
        if self.options.weights == "softmax":
            logits = self.scale * cosine
            top = logits.detach().masked_fill(~chosen, -torch.inf).amax(1, keepdim=True)
            # padding has no top; closed gates may lie above it, and must not overflow
            return (logits - top.clamp_min(-self.scale)).clamp_max(30.0).exp()
        return torch.ones_like(score)

    def _losses(
        self,
        score: Tensor,
        cosine: Tensor,
        gates: Tensor,
        opened: Tensor,
        mask: Tensor | None,
    ) -> dict[str, Tensor]:
        weight = self.options.losses
        assert weight is not None
        rows = exact(self.similarity)
        found: dict[str, Tensor] = {}
        if self.options.published:
            found["diversity"] = losses.published_diversity(rows, self.active)
            found["simplicity"] = losses.published_simplicity(rows)
            found["balance"] = losses.published_balance(gates, mask)
            # the released mean runs over all slots
            found["efficiency"] = losses.masked_mean(gates, mask).mean()
        else:
            if weight.diversity:
                found["diversity"] = losses.diversity(rows, self.active)
            if weight.simplicity:
                found["simplicity"] = losses.simplicity(rows, self.active)
            if weight.balance:
                found["balance"] = losses.balance(score, opened, self.active, mask)
            if weight.efficiency:
                found["efficiency"] = losses.efficiency(gates, self.active, mask)
        if weight.z:
            found["z"] = losses.z(self.scale * cosine, self.active, mask)
        weighted = {
            name: weight.weigh(name, value)
            for name, value in found.items()
            if getattr(weight, name)
        }
        if self.options.control == "loss" and self.options.target_k is not None:
            # a target without a coefficient would hold nothing
            value = losses.target_k(gates, self.options.target_k, mask)
            weighted["target_k"] = (weight.target_k or 0.01) * value
        return weighted

    def _calibrate(self, cosine: Tensor, mask: Tensor | None) -> Tensor:
        """Start thresholds at the quantile of the first batches that opens ``start_k`` gates.

        Returns the threshold to use.
        """
        options = self.options
        if not options.calibration:
            return self.threshold
        wanted = options.target_k or options.start_k
        assert wanted is not None
        # with missing experts tokens must be left unserved, or none would ever be missed
        by_slots = options.adapt is not None and options.adapt.share == "slots"
        return calibrate(
            cosine,
            mask,
            self.threshold,
            self.calibrated,
            self.active,
            rule="slots" if by_slots else "active",
            wanted=wanted,
            batches=options.calibration,
        )

    @torch.no_grad()
    def update_thresholds(self, load: Tensor, tokens: Tensor) -> None:
        """Raise the threshold of experts above their share of the load, lower it of those below.

        load: (E,), tokens: (), both since the last optimizer step and summed over ranks. Steps are
        proportional to the relative error, at most ``rate`` standard deviations of a random cosine.
        """
        if self.options.control != "threshold" or self.options.target_k is None or tokens <= 0:
            return
        target = tokens * self.options.target_k / self.active.sum()
        error = ((load - target) / target).clamp(-1.0, 1.0).to(self.threshold.dtype)
        moved = self.threshold + self.options.rate / math.sqrt(self.dim) * error
        self.threshold.copy_(torch.where(self.active, moved.clamp(-1.0, 1.0), self.threshold))


@final
class TopAny(RoutedExperts):
    """Experts whose number per token, and per layer, adapts (DynMoE)."""

    name: ClassVar[str] = "dynmoe"
    Options = TopAnyOptions

    @property
    def slots(self) -> int:
        return int(self.options.max_experts)

    @property
    def expected_k(self) -> float:
        options = self.options
        if options.published:  # thresholds start where half of the gates open
            return float((options.start_experts or options.max_experts) / 2)
        k = float(options.target_k or options.start_k or 1.0)
        if options.adapt is not None and options.adapt.share == "slots":
            k *= (options.start_experts or options.max_experts) / options.max_experts
        return max(1.0, k)  # the fallback serves every token

    def router(self, dim: int, seed: int = 0) -> TopAnyRouter:
        return TopAnyRouter(dim, self.options, seed)
