"""Auxiliary losses of routers, as pure functions. All skip padding and inactive experts.

Shapes throughout: T tokens, E expert slots; active: (E,) bool; mask: (T,) bool or None.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.core.errors import RequestError


@final
@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """The coefficient of each auxiliary loss; 0 leaves the loss out of the computation."""

    diversity: float = 0.0
    simplicity: float = 0.0
    balance: float = 0.0
    z: float = 0.0
    efficiency: float = 0.0
    entropy: float = 0.0
    target_k: float = 0.0
    importance: float = 0.0
    load: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            if not getattr(self, f.name) >= 0:
                raise RequestError(
                    f"the coefficient of the {f.name} loss must be at least 0, "
                    f"got {getattr(self, f.name)}"
                )

    def require(self, router: str, known: tuple[str, ...]) -> None:
        """Raise RequestError if a coefficient is set of a loss that ``router`` does not have."""
        for f in fields(self):
            if f.name not in known and getattr(self, f.name):
                raise RequestError(f"{router} has no {f.name} loss; its losses: {', '.join(known)}")

    def weigh(self, name: str, value: Tensor) -> Tensor:
        """The loss times its coefficient."""
        weighted: Tensor = getattr(self, name) * value
        return weighted

    def wanted(self) -> list[str]:
        """The losses whose coefficient is not 0."""
        return [f.name for f in fields(self) if getattr(self, f.name)]


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over axis 0 of values: (T, ...) where mask is True; 0 if nothing is."""
    if mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    kept = values * mask.reshape(-1, *[1] * (values.ndim - 1))
    return kept.sum(0) / mask.sum().clamp_min(1)


def diversity(similarity: Tensor, active: Tensor) -> Tensor:
    """Mean squared cosine between the rows of different active experts; similarity: (E, d)."""
    # of all rows, and masked: the shape of a graph may not depend on how many experts there are
    live = active.to(similarity.dtype)
    rows = F.normalize(similarity, dim=1)
    same = torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    gram = ((rows @ rows.t()) * live[:, None] * live).masked_fill(same, 0.0)
    count = active.sum()
    off: Tensor = gram.square().sum()
    return off / (count * (count - 1)).clamp_min(1)


def simplicity(similarity: Tensor, active: Tensor) -> Tensor:
    """Mean norm of the active experts' rows; similarity: (E, d)."""
    norms: Tensor = (similarity.norm(dim=1) * active).sum()
    return norms / active.sum().clamp_min(1)


def published_diversity(similarity: Tensor, active: Tensor) -> Tensor:
    """DynMoE as released: Frobenius norm of the normalised rows' Gram matrix minus identity."""
    rows = F.normalize(similarity, dim=1)
    off = rows @ rows.t() - torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
    both = active.to(rows.dtype)
    norm: Tensor = torch.linalg.vector_norm(off * both[:, None] * both[None, :])
    return norm


def published_simplicity(similarity: Tensor) -> Tensor:
    """DynMoE as released: mean norm of the rows of all slots, inactive ones too."""
    mean: Tensor = similarity.norm(dim=1).mean()
    return mean


def published_balance(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """DynMoE as released (DeepSpeed form); gates: (T, E) in {0, 1}, straight-through.

    Over tokens with an open gate: mean_e(mean_t(g/k) mean_t(g)) E^2, with E the number of slots.
    """
    opened = gates.detach().sum(1)
    served = opened > 0 if mask is None else (opened > 0) & mask
    share = masked_mean(gates / opened.clamp_min(1)[:, None], served)
    load = masked_mean(gates, served)
    return (share * load).mean() * gates.shape[1] ** 2


def balance(
    scores: Tensor,
    chosen: Tensor,
    active: Tensor,
    mask: Tensor | None = None,
    *,
    null: int = 0,
) -> Tensor:
    """Switch form, 1 when balanced: E_active sum_e f_e P_e (Fedus et al. 2022, eq. 4).

    scores: (T, E) non-negative, differentiable; chosen: (T, E) bool. f_e is the share of all rows
    that expert e takes (no gradient), P_e the mean share of the scores that it gets. The last
    ``null`` columns are null experts: each counts with their mean load, since it does not matter
    which of them a token takes (AdaMoE, arXiv 2406.13233).
    """
    live = scores * active
    share = live / live.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    rows = chosen if mask is None else chosen & mask[:, None]
    load = rows.sum(0).to(scores.dtype)
    if null:
        # over experts, not over tokens, which the sum above has already taken
        load = torch.cat([load[:-null], load[-null:].mean().expand(null)])
    fraction = load / load.sum().clamp_min(1)
    return active.sum() * (fraction * masked_mean(share, mask)).sum()


def z(logits: Tensor, active: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits (T, E) of active experts (Zoph et al. 2022, eq. 5)."""
    live = logits.masked_fill(~active, -torch.inf)
    return masked_mean(live.logsumexp(1).square(), mask)


def entropy(logits: Tensor, active: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy, in nats, of the softmax over active experts (Huang et al. 2024).

    logits: (T, E). An expert whose probability underflows adds 0, not NaN.
    """
    live = logits.masked_fill(~active, torch.finfo(logits.dtype).min)
    log = live.log_softmax(1)
    return masked_mean(-(log.exp() * log).masked_fill(~active, 0.0).sum(1), mask)


def efficiency(gates: Tensor, active: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean share of active experts that a token takes; gates: (T, E), straight-through."""
    return masked_mean((gates * active).sum(1), mask) / active.sum().clamp_min(1)


def target_k(gates: Tensor, target: float, mask: Tensor | None = None) -> Tensor:
    """Squared distance of the mean number of open gates from a target; gates: (T, E)."""
    return (masked_mean(gates.sum(1), mask) - target).square()


def cv_squared(sums: Tensor, active: Tensor) -> Tensor:
    """Squared coefficient of variation of the active experts' sums: (E,) -> scalar.

    0 when all are equal, one expert is active, or nothing was summed; at most E_active - 1 for
    non-negative sums.
    """
    count = active.sum()
    mean = (sums * active).sum() / count
    squared: Tensor = ((sums - mean) * active).square().sum() / count
    return squared / torch.where(mean > 0, mean.square(), 1.0)


def importance(gates: Tensor, active: Tensor, mask: Tensor | None = None) -> Tensor:
    """CV squared of the experts' summed gates (Shazeer et al. 2017, equations 6 and 7).

    gates: (T, E) non-negative, differentiable: the weights by which outputs are multiplied, 0
    where an expert was not chosen.
    """
    real = gates if mask is None else gates * mask[:, None]
    return cv_squared(real.sum(0), active)


def chance_of_top_k(
    logits: Tensor, noisy: Tensor, spread: Tensor, k: int, active: Tensor
) -> Tensor:
    """How likely each expert is in the top k if its own noise is drawn anew; (T, E) in [0, 1].

    logits: without noise; noisy: with it; spread: (T, E) its standard deviations, positive.
    Shazeer et al. 2017, equations 8 and 9: the clean logit must pass, by a normal distribution,
    the k-th largest noisy logit of the *other* experts: that is the (k+1)-th of all for an expert
    in the top k, and the k-th of all for any other. With at most k active experts it is certain.
    """
    if k >= active.shape[0]:
        return active.to(logits.dtype).expand_as(logits)
    top = noisy.masked_fill(~active, -torch.inf).topk(k + 1, dim=1).values
    enters, stays = top[:, k - 1 : k], top[:, k : k + 1]
    # of equal logits at the border either may be in: both thresholds are then the same
    inside = noisy > stays
    certain = active.sum() <= k
    border = torch.where(inside, stays, enters).masked_fill(certain, 0.0)
    chance: Tensor = torch.special.ndtr((logits - border) / spread)
    return chance.masked_fill(certain, 1.0) * active


def load(chances: Tensor, active: Tensor, mask: Tensor | None = None) -> Tensor:
    """CV squared of the experts' expected loads (Shazeer et al. 2017, equations 10 and 11).

    chances: (T, E), of each expert to be chosen; see ``chance_of_top_k``.
    """
    real = chances if mask is None else chances * mask[:, None]
    return cv_squared(real.sum(0), active)
