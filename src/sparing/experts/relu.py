"""ReLU routing: every gate that is positive is open, and its value is the expert's weight.

Wang et al. 2024, *ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing* (arXiv
2412.14711; code github.com/thu-ml/ReMoE). Nothing is chosen: gates open and close by gradient, and
an L1 penalty whose coefficient adapts holds the mean number of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.experts import losses
from sparing.experts.calibration import calibrate
from sparing.experts.method import ExpertOptions, RoutedExperts
from sparing.experts.router import Router, exact, normal_
from sparing.experts.routing import Routing

CHOICES = {
    "penalty": ("balanced", "plain"),
    "fallback": ("best", "zero"),
    "start": ("half", "calibrated"),
}


@final
@dataclass(frozen=True, kw_only=True)
class ReLUOptions(ExpertOptions):
    """Options of ReLU routing.

    experts: in each layer. target_k: mean number of open gates per token to hold.
    penalty: the L1 norm of a token's gates, ``balanced`` by each expert's share of the load as
    published (section 3.4), or ``plain`` (section 3.3).
    coefficient: of the penalty at first; after each optimizer step it is multiplied by ``factor``
    if more gates were open than ``target_k``, divided if fewer, and kept in [least, most].
    normalize: whether a token's weights sum to 1, or are the gates as published.
    fallback: a token without an open gate takes its ``best`` expert with the sigmoid of its logit
    as weight, or none, with output ``zero`` as published.
    start: about ``half`` of the gates are open at first as published, or each expert's offset is
    ``calibrated`` on the first ``calibration`` training batches to open target_k.
    """

    experts: int = 8
    target_k: float = 2.0
    penalty: Literal["balanced", "plain"] = "balanced"
    coefficient: float = 1e-8
    factor: float = 1.2
    least: float = 1e-10
    most: float = 10.0
    normalize: bool = False
    fallback: Literal["best", "zero"] = "best"
    start: Literal["half", "calibrated"] = "half"
    calibration: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("experts", self.experts, 1)
        require_number("target_k", self.target_k, 0, self.experts)
        if self.target_k == 0:
            raise RequestError("target_k must be above 0")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise RequestError(f'{name} must be one of {", ".join(known)}, got "{value}"')
        require_number("factor", self.factor, 1)
        require_number("least", self.least, 0)
        if self.least == 0:
            raise RequestError("least must be above 0, or the coefficient could never grow again")
        require_number("most", self.most, self.least)
        require_number("coefficient", self.coefficient, self.least, self.most)
        require_whole("calibration", self.calibration, 1)


@final
class ReLUGates(Router):
    """The router module; see ReLUOptions.

    coefficient: (), of the penalty now; offset: (E,), what a logit must exceed (calibrated start).
    """

    steers_each = False
    coefficient: Tensor
    calibrated: Tensor
    offset: nn.Parameter | None

    def __init__(self, dim: int, options: ReLUOptions, seed: int = 0) -> None:
        super().__init__(dim, options.experts)
        self.options = options
        normal_(self.similarity, torch.Generator().manual_seed(seed))
        self.register_buffer("coefficient", torch.tensor(float(options.coefficient)))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.int64))
        calibrates = options.start == "calibrated"
        self.offset = nn.Parameter(torch.zeros(options.experts)) if calibrates else None

    def slots(self) -> dict[str, nn.Parameter]:
        known = {"similarity": self.similarity}
        return known if self.offset is None else {**known, "offset": self.offset}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(exact(x), exact(self.similarity))
            if self.offset is not None:
                logits = logits - exact(self._offset(logits, mask, self.offset))
            live = self.active.expand_as(logits)
            if mask is not None:
                live = live & mask[:, None]
            gates = logits.relu()
            opened = (logits > 0) & live
            real = torch.ones_like(opened[:, 0]) if mask is None else mask
            unserved = ~opened.any(1) & real
            chosen, weights = opened, gates
            if self.options.fallback == "best":
                level = logits.detach().masked_fill(~self.active, -torch.inf)
                forced = torch.zeros_like(opened)
                if level.shape[0]:
                    forced.scatter_(1, level.argmax(1, keepdim=True), True)
                forced &= unserved[:, None]
                chosen = opened | forced
                # positive, so that the expert is of use, and with a gradient, so that its gate
                # can learn to open; a closed gate's own value has neither
                weights = torch.where(forced, logits.sigmoid(), gates)
            if self.options.normalize:
                kept = weights * chosen
                total = kept.sum(1, keepdim=True)
                weights = kept / torch.where(total > 0, total, torch.ones_like(total))
            auxiliary = {}
            if self.training:
                value = self._penalty(gates, opened, mask)
                auxiliary["l1"] = exact(self.coefficient) * value
            routing = Routing.from_map(chosen, weights, auxiliary)
            routing.unserved = unserved
            return routing

    def _offset(self, logits: Tensor, mask: Tensor | None, offset: Tensor) -> Tensor:
        """The offsets to use; they start where the first batches open ``target_k`` gates."""
        if not self.training:
            return offset
        return calibrate(
            logits,
            mask,
            offset,
            self.calibrated,
            self.active,
            rule="active",
            wanted=self.options.target_k,
            batches=self.options.calibration,
        )

    def _penalty(self, gates: Tensor, opened: Tensor, mask: Tensor | None) -> Tensor:
        """sum_e f_e P_e with P_e the mean gate and f_e = E / k* times the share of tokens.

        f_e is 1 where every expert has its share of the target (ReMoE); plain: f_e = 1.
        """
        mean = losses.masked_mean(gates * self.active, mask)
        if self.options.penalty == "plain":
            return mean.sum()
        load = losses.masked_mean(opened.to(gates.dtype), mask)
        return (load * self.active.sum() / self.options.target_k * mean).sum()

    @torch.no_grad()
    def update_thresholds(self, load: Tensor, tokens: Tensor) -> None:
        """Raise the penalty if more gates were open than target_k, lower it if fewer.

        load: (E,), open gates; tokens: (); both since the last optimizer step, summed over ranks
        (ReMoE does so too, but with one coefficient for all layers).
        """
        if tokens <= 0:
            return
        direction = torch.sign(load.sum() / tokens - self.options.target_k)
        factor = self.options.factor**direction
        changed = (self.coefficient * factor).clamp(self.options.least, self.options.most)
        self.coefficient.copy_(changed)


@final
class ReLURouter(RoutedExperts):
    """Experts with ReLU gates, fully differentiable (ReMoE)."""

    name: ClassVar[str] = "relu"
    Options = ReLUOptions

    @property
    def expected_k(self) -> float:
        # what it comes to; for the first hundred steps or so of a "half" start it is more
        least = 1.0 if self.options.fallback == "best" else 0.0
        return max(least, float(self.options.target_k))

    def router(self, dim: int, seed: int = 0) -> ReLUGates:
        return ReLUGates(dim, self.options, seed)
