"""Random routing: the control that every choice of experts must beat, and sometimes does not.

Zuo et al. 2022 (arXiv 2110.04260) train with experts drawn at random for each input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.experts.method import ExpertOptions, RoutedExperts
from sparing.experts.noise import Noise
from sparing.experts.router import Router, exact
from sparing.experts.routing import Routing
from sparing.experts.selection import normalised, top_k_map
from sparing.experts.token_hash import projection, sign_codes, uniform


@final
@dataclass(frozen=True, kw_only=True)
class RandomExpertsOptions(ExpertOptions):
    """Options of random routing.

    experts: in each layer. k: mean experts per token; of 2.3 every token takes 2, and one more
    with probability 0.3, so that the cost of any method can be met.
    """

    experts: int = 8
    k: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("experts", self.experts, 1)
        require_number("k", self.k)
        if not 0 < self.k <= self.experts:
            raise RequestError(
                f"k must be above 0 and at most experts ({self.experts}), got {self.k}"
            )


class UnlearnedRouter(Router):
    """Abstract: routes without learned parameters, each of a token's experts by the same weight.

    directions: (BITS, d), random planes by which a token's input gets its code.
    """

    directions: Tensor

    def __init__(self, dim: int, slots: int, seed: int) -> None:
        super().__init__(dim, slots)
        self.seed = seed
        # no one looks at these rows; without gradient, so that no rank waits for theirs
        self.similarity.requires_grad_(False).zero_()
        self.register_buffer("directions", projection(dim, seed))

    def coded_flops(self, tokens: int) -> int:
        """Floating-point operations of so many codes of inputs."""
        return 2 * tokens * self.directions.numel()

    def route(self, keys: Tensor, k: Tensor | int, mask: Tensor | None) -> Routing:
        """The k best active experts by random keys (T, E), weighted alike."""
        chosen = top_k_map(keys, k, self.active)
        if mask is not None:
            chosen = chosen & mask[:, None]
        return Routing(chosen, normalised(torch.ones_like(keys), chosen))


@final
class RandomRouter(UnlearnedRouter):
    """The router module; see RandomExpertsOptions.

    Training draws from the router's own generator. Evaluation must give a token the same experts
    in any batch: there they follow from a hash of its input (random planes, see ``token_hash``;
    hash layers, Roller et al. 2021, arXiv 2106.04426, hash the token's id).
    """

    def __init__(self, dim: int, options: RandomExpertsOptions, seed: int = 0) -> None:
        super().__init__(dim, options.experts, seed)
        self.options = options
        self.noise = Noise(seed)

    def flops(self, tokens: int) -> int:
        return 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            columns = self.slots_count + 1
            x = exact(x)
            if self.training:
                drawn = self.noise.uniform(x, columns)
            else:
                drawn = uniform(sign_codes(x, self.directions), columns, self.seed).to(x.dtype)
            least = math.floor(self.options.k)
            k = least + (drawn[:, -1] < self.options.k - least).long()
            return self.route(drawn[:, :-1], k, mask)


@final
class RandomExperts(RoutedExperts):
    """Each token takes random experts, in any mean number: the control at equal cost."""

    name: ClassVar[str] = "random"
    chooses: ClassVar[bool] = False
    Options = RandomExpertsOptions

    def router(self, dim: int, seed: int = 0) -> RandomRouter:
        return RandomRouter(dim, self.options, seed)
