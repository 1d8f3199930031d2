"""Softmax top-k routing (Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2022), dropless.

Limited to a token's best groups of experts by option, as in DeepSeek-V2 (arXiv 2405.04434), or with
null experts, which cost nothing, beside the true ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts import losses
from sparing.experts.fixed_k import FixedKRouter, GroupedOptions, Scores
from sparing.experts.method import RoutedExperts
from sparing.experts.null import NullExperts, NullOptions
from sparing.experts.one_token import best, softmax
from sparing.experts.router import exact
from sparing.experts.routing import Routing


@final
@dataclass(frozen=True, kw_only=True)
class TopKOptions(GroupedOptions, NullOptions):
    """Options of top-k routing; see FixedKOptions, GroupedOptions and NullOptions.

    With null experts, k counts them too; groups are of true experts, and not to be had with both.
    """

    router_name: ClassVar[str] = "top-k routing"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_null_weights(bool(self.normalize))
        if self.null_experts and self.groups is not None:
            raise RequestError("null experts belong to no group; leave out groups or null_experts")

    @property
    def choices(self) -> int:
        return self.experts + self.null_experts


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
        generator = torch.Generator().manual_seed(seed + 1)
        self.null = NullExperts(dim, options, generator) if options.null_experts else None

    @property
    def products(self) -> int:
        return self.slots_count + (self.null.products if self.null else 0)

    @property
    def live(self) -> Tensor:
        if self.null is None:
            return self.active
        return torch.cat([self.active, self.active.new_ones(self.null.count)])

    def scores(self, x: Tensor) -> Scores:
        logits = self.logits(x)
        if self.null is not None:
            logits, _ = self.null.join(x, logits, self.active)
        return Scores(logits, logits.masked_fill(~self.live, -torch.inf).softmax(1))

    def one(self, x: Tensor) -> tuple[list[int], list[float]] | None:
        if self.null is not None or self.groups is not None:
            return None
        logits = torch.mv(exact(self.similarity), exact(x)).tolist()
        live = self.active.tolist()
        picked = best(logits, live, self.k)
        if picked is None:
            return None
        if self.normalize:
            return picked, softmax(logits, picked)
        every = [e for e, there in enumerate(live) if there]
        shares = dict(zip(every, softmax(logits, every), strict=True))
        return picked, [shares[e] for e in picked]

    def weigh(self, score: Tensor, chosen: Tensor) -> Tensor:
        if self.null is None or not self.normalize:
            return super().weigh(score, chosen)
        return self.null.normalize(score, chosen)

    def loss(self, name: str, found: Scores, chosen: Tensor, mask: Tensor | None) -> Tensor:
        if name == "balance":
            null = self.options.null_experts
            return losses.balance(found.score, chosen, self.live, mask, null=null)
        return losses.z(found.logits, self.live, mask)

    def routing(
        self, x: Tensor, chosen: Tensor, weights: Tensor, auxiliary: dict[str, Tensor]
    ) -> Routing:
        if self.null is None:
            return super().routing(x, chosen, weights, auxiliary)
        return self.null.route(x, chosen, weights, auxiliary)


@final
class TopK(RoutedExperts):
    """The usual sparse experts: each token takes its k best by softmax score."""

    name: ClassVar[str] = "top-k"
    Options = TopKOptions

    @property
    def expected_k(self) -> float:
        options = self.options
        # of k, null experts take their share, which the balance loss keeps near even
        return float(options.k * options.experts / options.choices)

    def router(self, dim: int, seed: int = 0) -> TopKRouter:
        return TopKRouter(dim, self.options, seed)
