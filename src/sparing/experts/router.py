"""What every router is: scores of E expert slots for T tokens, turned into a Routing."""

from __future__ import annotations

import abc
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.experts.routing import Routing


class Router(nn.Module, abc.ABC):
    """Owns the router's parameters and the set of active expert slots; final classes route.

    similarity: (E, d) one row for each slot; active: (E,) bool, which slots hold an expert.
    All slots are allocated from the start: switching a slot on or off never makes parameters.
    """

    tells_loads: ClassVar[bool] = True
    """A routing has ``counts``: see ``core/loads.py``."""
    causal: ClassVar[bool] = True
    """Whether a token's routing in training is independent of the other tokens of the batch."""
    similarity: nn.Parameter
    active: Tensor
    steers_each: ClassVar[bool] = True
    """Whether ``update_thresholds`` steers each expert to a share of the load, of which missing
    experts then leave theirs unserved; or the number of experts per token whatever they are."""

    def __init__(self, dim: int, slots: int, start: int | None = None) -> None:
        super().__init__()
        if slots < 1:
            raise RequestError(f"the number of experts must be at least 1, got {slots}")
        start = slots if start is None else start
        if not 1 <= start <= slots:
            raise RequestError(f"experts to start with must be between 1 and {slots}, got {start}")
        self.dim, self.slots_count = dim, slots
        self.similarity = nn.Parameter(torch.empty(slots, dim))
        self.register_buffer("active", torch.arange(slots) < start)

    @abc.abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route x: (T, d); mask: (T,) bool, False for padding, which gets no rows."""

    def one(self, x: Tensor) -> tuple[list[int], list[float]] | None:
        """The experts of one token x: (d,), and their weights, in evaluation without gradient.

        What ``forward`` finds, in plain numbers, for decoding; None: ask ``forward``.
        """
        return None

    @property
    def tracks_outputs(self) -> bool:
        """Whether routing needs running means of the experts' outputs."""
        return False

    @property
    def products(self) -> int:
        """How many products of size d routing a token takes, for the ledger."""
        return self.slots_count

    def update_thresholds(self, load: Tensor, tokens: Tensor) -> None:
        """Steer the load outside of forward; load: (E,), tokens: (), since the last step."""

    def flops(self, tokens: int) -> int:
        """Floating-point operations of routing that many training tokens, forward and backward."""
        # backward costs the product again for the input, and for rows that are trained
        passes = 3 if self.similarity.requires_grad else 2
        # one more where closed gates are credited with the experts' mean outputs
        return 2 * tokens * self.dim * self.products * (passes + int(self.tracks_outputs))

    def begin(self, ids: Tensor | None) -> None:
        """A forward pass of the model begins; ids: (B, S) int64, its tokens', or None."""

    def slots(self) -> dict[str, nn.Parameter]:
        """The parameters whose axis 0 is the expert slot."""
        return {"similarity": self.similarity}


def exact(x: Tensor) -> Tensor:
    """Routers compute in float32 whatever the activations' type; float64 is kept for checks."""
    return x if x.dtype == torch.float64 else x.float()


def scores_of(x: Tensor, router: Router) -> Tensor:
    """The products of tokens x: (T, d), float32 or float64, with each slot's row; (T, E)."""
    return F.linear(x, exact(router.similarity))


def orthogonal_rows_(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Fill weight: (E, d) with rows of norm 1, orthogonal within each group of d rows."""
    slots, dim = weight.shape
    with torch.no_grad():
        for first in range(0, slots, dim):
            rows = min(dim, slots - first)
            random = torch.randn(dim, rows, generator=generator)
            weight[first : first + rows] = torch.linalg.qr(random).Q.t()
    return weight


def normal_(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Fill weight: (E, d) with a normal distribution of standard deviation 1/sqrt(d)."""
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[-1]))
    return weight
