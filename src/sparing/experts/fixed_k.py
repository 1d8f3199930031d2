"""What routers that give every token the same number of experts have in common."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.experts import losses
from sparing.experts.losses import LossWeights
from sparing.experts.method import ExpertOptions, nested
from sparing.experts.router import Router, exact, normal_, scores_of
from sparing.experts.routing import Routing
from sparing.experts.selection import Groups, normalised, top_k_map


@dataclass(frozen=True, kw_only=True)
class ScoredOptions(ExpertOptions):
    """Options of routers with a score for each expert and losses on it.

    experts: in each layer; losses: coefficients (LossWeights, or a mapping) of the auxiliary
    losses that the router has; RequestError for one that it has not.
    """

    router_name: ClassVar[str]
    known_losses: ClassVar[tuple[str, ...]] = ("balance", "z")

    experts: int = 8
    losses: LossWeights = field(default_factory=lambda: LossWeights(balance=0.01))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("experts", self.experts, 1)
        object.__setattr__(self, "losses", nested("losses", self.losses, LossWeights))
        self.losses.require(self.router_name, self.known_losses)


@dataclass(frozen=True, kw_only=True)
class FixedKOptions(ScoredOptions):
    """Options of routers by which each token takes its k best experts.

    k: experts of each token. normalize: whether a token's weights sum to 1; default for k > 1
    only, since the weight of a single normalised expert is constant and its router would get no
    gradient.
    """

    k: int = 2
    normalize: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("k", self.k, 1)
        if self.k > self.choices:
            raise RequestError(f"k must be at most experts ({self.choices}), got {self.k}")
        if self.normalize is None:
            object.__setattr__(self, "normalize", self.k > 1)

    @property
    def choices(self) -> int:
        """How many a token chooses among."""
        return self.experts


@dataclass(frozen=True, kw_only=True)
class GroupedOptions(FixedKOptions):
    """Options of routers that may be limited to a token's best groups of experts.

    groups: equal groups of neighbouring experts, such as those of one device; None is no limit.
    groups_kept: groups that each token may use. group_best: a group is worth the sum of that many
    of its best scores, 2 as in DeepSeek-V3 or 1 as in DeepSeek-V2.
    """

    groups: int | None = None
    groups_kept: int | None = None
    group_best: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("group_best", self.group_best, 1)
        if self.groups is None:
            if self.groups_kept is not None:
                raise RequestError("groups_kept needs groups: into how many the experts are split")
            return
        require_whole("groups", self.groups, 1)
        if self.groups_kept is None:
            raise RequestError("groups needs groups_kept: how many of them a token may use")
        require_whole("groups_kept", self.groups_kept, 1)
        if self.experts % self.groups:
            raise RequestError(
                f"experts must be a multiple of groups ({self.groups}), got {self.experts}"
            )
        if self.groups_kept > self.groups:
            raise RequestError(
                f"groups_kept must be at most groups ({self.groups}), got {self.groups_kept}"
            )
        within = self.experts // self.groups * self.groups_kept
        if self.k > within:
            raise RequestError(
                f"k must be at most the {within} experts of {self.groups_kept} kept groups, "
                f"got {self.k}; keep more groups"
            )

    def limit(self) -> Groups | None:
        """The limit as the selection takes it, or None."""
        if self.groups is None or self.groups_kept is None:
            return None
        return Groups(count=self.groups, kept=self.groups_kept, best=self.group_best)


@final
@dataclass(slots=True)
class Scores:
    """What a router thinks of each expert for each token; all (T, E).

    logits: before any noise; score: non-negative, differentiable, what weights are made of;
    ranking: what the choice goes by (no gradient), by default the score; noisy, spread: logits
    with noise and the standard deviation of that noise, where there is any.
    """

    logits: Tensor
    score: Tensor
    ranking: Tensor | None = None
    noisy: Tensor | None = None
    spread: Tensor | None = None


class FixedKRouter(Router, abc.ABC):
    """Abstract: scores the experts, takes the k best, weighs them by their scores."""

    def __init__(
        self,
        dim: int,
        *,
        slots: int,
        k: int,
        normalize: bool,
        weights: LossWeights,
        groups: Groups | None = None,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, slots)
        self.k, self.normalize, self.loss_weights = k, normalize, weights
        self.groups, self.scale = groups, scale
        normal_(self.similarity, torch.Generator().manual_seed(seed))

    @abc.abstractmethod
    def scores(self, x: Tensor) -> Scores:
        """Judge the experts for x: (T, d), float32 or float64."""

    def logits(self, x: Tensor) -> Tensor:
        """(T, d) -> (T, E), the products with each slot's row."""
        return scores_of(x, self)

    def alive(self, logits: Tensor) -> Tensor:
        """The logits with minus infinity at inactive slots."""
        return logits.masked_fill(~self.active, -torch.inf)

    @property
    def live(self) -> Tensor:
        """Which columns of the scores may be chosen, bool; as many as the scores have."""
        return self.active

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            found = self.scores(exact(x))
            live = self.live
            ranking = found.score if found.ranking is None else found.ranking
            chosen = top_k_map(ranking.detach(), self.k, live, self.groups)
            if mask is not None:
                chosen = chosen & mask[:, None]
            weights = self.weigh(found.score, chosen)
            if self.scale != 1:
                weights = weights * self.scale
            auxiliary = {}
            if self.training:
                auxiliary = {
                    name: self.loss_weights.weigh(name, self.loss(name, found, chosen, mask))
                    for name in self.loss_weights.wanted()
                }
            routing = self.routing(x, chosen, weights, auxiliary)
            routing.most = self.k
            return routing

    def routing(
        self, x: Tensor, chosen: Tensor, weights: Tensor, auxiliary: dict[str, Tensor]
    ) -> Routing:
        """The rows of what was chosen; x: (T, d), chosen, weights: as many columns as scores."""
        return Routing(chosen, weights, auxiliary)

    def weigh(self, score: Tensor, chosen: Tensor) -> Tensor:
        """The weights of the chosen experts, before ``scale``; (T, E), 0 elsewhere."""
        return normalised(score, chosen) if self.normalize else score * chosen

    def loss(self, name: str, found: Scores, chosen: Tensor, mask: Tensor | None) -> Tensor:
        """One auxiliary loss, a scalar, not yet weighted."""
        if name == "balance":
            return losses.balance(found.score, chosen, self.active, mask)
        return losses.z(found.logits, self.active, mask)
