"""Hash layers: which experts a token takes is fixed by its id (Roller et al. 2021, 2106.04426)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.experts.method import ExpertOptions, RoutedExperts
from sparing.experts.random import UnlearnedRouter
from sparing.experts.router import exact
from sparing.experts.routing import Routing
from sparing.experts.token_hash import sign_codes, uniform


@final
@dataclass(frozen=True, kw_only=True)
class HashExpertsOptions(ExpertOptions):
    """Options of hash routing.

    experts: in each layer; k: that each token takes. by: hash the ``token``'s id where the model
    is called with ``input_ids`` of the layer's shape, else its input; or the ``input`` always, by
    the side of random planes on which it lies.
    """

    experts: int = 8
    k: int = 1
    by: Literal["token", "input"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("experts", self.experts, 1)
        require_whole("k", self.k, 1)
        if self.k > self.experts:
            raise RequestError(f"k must be at most experts ({self.experts}), got {self.k}")
        if self.by not in ("token", "input"):
            raise RequestError(f'by must be "token" or "input", got "{self.by}"')


@final
class HashRouter(UnlearnedRouter):
    """The router module; see HashExpertsOptions.

    A token takes the k experts whose keys are highest, a key being a hash of token and expert
    (Thaler and Ravishankar 1998): where one slot is switched off, only its tokens move. Layers
    have different seeds, so that tokens which share an expert in one need not in the next.
    """

    def __init__(self, dim: int, options: HashExpertsOptions, seed: int = 0) -> None:
        super().__init__(dim, options.experts, seed)
        self.options = options
        self.ids: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # ids belong to a batch
        return {**self.__dict__, "ids": None}

    def begin(self, ids: Tensor | None) -> None:
        self.ids = ids

    def flops(self, tokens: int) -> int:
        by_id = self.options.by == "token" and self.ids is not None
        return 0 if by_id else self.coded_flops(tokens)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            x = exact(x)
            ids = self.ids if self.options.by == "token" else None
            if ids is not None and ids.numel() == x.shape[0]:
                codes = ids.reshape(-1).to(x.device, torch.int64)
            else:
                codes = sign_codes(x, self.directions)
            keys = uniform(codes, self.slots_count, self.seed).to(x.dtype)
            return self.route(keys, self.options.k, mask)


@final
class HashExperts(RoutedExperts):
    """Each token takes the experts that a hash of its id names: nothing is learned."""

    name: ClassVar[str] = "hash"
    chooses: ClassVar[bool] = False
    Options = HashExpertsOptions

    def router(self, dim: int, seed: int = 0) -> HashRouter:
        return HashRouter(dim, self.options, seed)
