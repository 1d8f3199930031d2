"""Null experts: router rows that a token may choose and that cost no expert's products.

Zero experts give nothing (AdaMoE, Zeng et al. 2024, arXiv 2406.13233), copies give the token back,
constants mix it with a learned vector (MoE++, Jin et al. 2024, arXiv 2410.07348). With a fixed k,
a token that chooses m of them is computed by k - m true experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.experts.method import ExpertOptions
from sparing.experts.router import exact, normal_
from sparing.experts.routing import Routing

Kind = Literal["zero", "copy", "constant"]
KINDS = ("zero", "copy", "constant")
OVER = ("true", "all")


@dataclass(frozen=True, kw_only=True)
class NullOptions(ExpertOptions):
    """Options of routed methods that can have null experts.

    null_experts: how many in each layer, beside the true ones. null_kind: what they give: ``zero``
    nothing, ``copy`` the token, ``constant`` a learned mix of the token and a learned vector.
    null_weights: what normalised weights sum to 1 over: a token's ``true`` experts, whatever null
    experts it takes beside them, whose weights stay probabilities; or ``all`` that it takes. By
    default ``true`` for zero experts, which would only shrink the output, and ``all`` for the
    others, whose output takes part in the sum.
    """

    null_experts: int = 0
    null_kind: Kind = "zero"
    null_weights: Literal["true", "all"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("null_experts", self.null_experts, 0)
        if self.null_kind not in KINDS:
            raise RequestError(
                f'null_kind must be one of {", ".join(KINDS)}, got "{self.null_kind}"'
            )
        if self.null_weights is not None and self.null_weights not in OVER:
            raise RequestError(
                f'null_weights must be one of {", ".join(OVER)}, got "{self.null_weights}"'
            )

    def check_null_weights(self, normalize: bool) -> None:
        """Raise RequestError if ``null_weights`` is given where weights are not normalised."""
        if self.null_weights is not None and not normalize:
            raise RequestError(
                "null_weights says what normalised weights sum over; leave it out or take "
                "normalize=True"
            )

    @property
    def weights_over(self) -> Literal["true", "all"]:
        """``null_weights``, with the default of the kind."""
        if self.null_weights is not None:
            return self.null_weights
        return "true" if self.null_kind == "zero" else "all"


@final
class NullExperts(nn.Module):
    """N null experts of a router with E true ones.

    similarity: (N, d), their router rows. Constants have vector: (N, d) and mix: (2 N, d), which
    starts at zero: half of the token and half of the vector.
    """

    vector: nn.Parameter | None
    mix: nn.Parameter | None

    def __init__(self, dim: int, options: NullOptions, generator: torch.Generator) -> None:
        super().__init__()
        self.count, self.kind = options.null_experts, options.null_kind
        self.over = options.weights_over
        self.similarity = nn.Parameter(torch.empty(self.count, dim))
        normal_(self.similarity, generator)
        learned = self.kind == "constant"
        self.vector = nn.Parameter(torch.zeros(self.count, dim)) if learned else None
        self.mix = nn.Parameter(torch.zeros(2 * self.count, dim)) if learned else None

    @property
    def products(self) -> int:
        """How many products of size d a token costs here, for the ledger."""
        return self.count * (4 if self.kind == "constant" else 1)

    def join(self, x: Tensor, logits: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (T, E) to (T, E + N), and which columns may be chosen, (E + N,); x: (T, d)."""
        own = F.linear(exact(x), exact(self.similarity))
        return torch.cat([logits, own], 1), torch.cat([active, active.new_ones(self.count)])

    def normalize(self, score: Tensor, chosen: Tensor) -> Tensor:
        """(T, E + N): scores divided by the sum over the chosen, all of them or the true ones."""
        true = chosen.clone()
        if self.over == "true":
            true[:, -self.count :] = False
        total = (score * true).sum(1, keepdim=True)
        # a token whose experts are all null has no true weight: a sum of 1 rather than 0/0
        scaled = score / torch.where(total > 0, total, torch.ones_like(total))
        return torch.where(true, scaled, score)

    def route(
        self, x: Tensor, chosen: Tensor, weights: Tensor, losses: dict[str, Tensor]
    ) -> Routing:
        """The rows of the true experts, and what the null ones give; chosen, weights: (T, E + N).

        What they give is a new tensor: the tokens themselves are never changed.
        """
        split = chosen.shape[1] - self.count
        routing = Routing(chosen[:, :split], weights[:, :split], losses)
        taken = weights[:, split:] * chosen[:, split:]
        if self.kind == "copy":
            routing.bypass = taken.sum(1, keepdim=True) * exact(x)
        elif self.vector is not None and self.mix is not None:
            share = F.linear(exact(x), exact(self.mix)).view(-1, self.count, 2).softmax(2)
            parts = taken.unsqueeze(2) * share
            kept = parts[..., 0].sum(1, keepdim=True) * exact(x)
            routing.bypass = kept + parts[..., 1] @ exact(self.vector)
        return routing

    def extra_repr(self) -> str:
        return f"{self.count} {self.kind}, weights over {self.over}"
