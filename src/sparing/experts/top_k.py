"""Softmax top-k routing (Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2022), dropless."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.experts import losses
from sparing.experts.losses import LossWeights
from sparing.experts.method import ExpertOptions, RoutedExperts, nested
from sparing.experts.router import Router, exact, normal_
from sparing.experts.routing import Routing


@final
@dataclass(frozen=True, kw_only=True)
class TopKOptions(ExpertOptions):
    """Options of top-k routing.

    experts: in each layer; k: that each token takes. normalize: whether a token's weights sum to
    1; default for k > 1 only, since the weight of a single normalised expert is constant and its
    router would get no gradient.
    """

    experts: int = 8
    k: int = 2
    normalize: bool | None = None
    losses: LossWeights = field(default_factory=lambda: LossWeights(balance=0.01))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("experts", self.experts, 1)
        require_whole("k", self.k, 1)
        if self.k > self.experts:
            raise RequestError(f"k must be at most experts ({self.experts}), got {self.k}")
        if self.normalize is None:
            object.__setattr__(self, "normalize", self.k > 1)
        object.__setattr__(self, "losses", nested("losses", self.losses, LossWeights))
        for name in ("diversity", "simplicity", "efficiency", "target_k"):
            if getattr(self.losses, name):
                raise RequestError(f"top-k routing has no {name} loss; its losses: balance, z")


@final
class TopKRouter(Router):
    """The router module; see TopKOptions."""

    def __init__(self, dim: int, options: TopKOptions, seed: int = 0) -> None:
        super().__init__(dim, options.experts)
        self.options = options
        normal_(self.similarity, torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(exact(x), exact(self.similarity))
            live = logits.masked_fill(~self.active, -torch.inf)
            score = live.softmax(1)
            picked = live.detach().topk(self.options.k, dim=1).indices
            # inactive experts come last, and only where fewer than k are active
            chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, picked, True)
            chosen = chosen & self.active
            if mask is not None:
                chosen = chosen & mask[:, None]
            weights = score
            if self.options.normalize:
                kept = score * chosen
                total = kept.sum(1, keepdim=True)
                weights = kept / torch.where(total > 0, total, torch.ones_like(total))
            auxiliary: dict[str, Tensor] = {}
            if self.training:
                weight = self.options.losses
                if weight.balance:
                    value = losses.balance(score, chosen, self.active, mask)
                    auxiliary["balance"] = weight.weigh("balance", value)
                if weight.z:
                    auxiliary["z"] = weight.weigh("z", losses.z(logits, self.active, mask))
            return Routing.from_map(chosen, weights, auxiliary)


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
