"""The weights of a mixture's D sources: from sizes, from losses, from gate loads. Pure functions.

Everything is float64 on the CPU. A weight is the share of samples that a source gives; weights sum
to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparing.core.errors import RequestError, unknown

DISTANCES = ("l2", "cosine")
CRITERIA = ("mean", "min", "max")


def normalised(weights: Tensor | Sequence[float], what: str = "weights") -> Tensor:
    """Weights of any scale as shares, (D,) float64.

    Raises RequestError unless they are finite and not negative, and one is above 0.
    """
    wide = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    if wide.ndim != 1 or not wide.numel():
        raise RequestError(f"{what} must be a vector, got shape {tuple(wide.shape)}")
    if not bool((torch.isfinite(wide) & (wide >= 0)).all()) or not bool(wide.sum() > 0):
        raise RequestError(
            f"{what} must be finite and not negative, and one above 0, got {wide.tolist()}"
        )
    return wide / wide.sum()


def tempered(sizes: Tensor | Sequence[float], temperature: float) -> Tensor:
    """w ~ size^(1 / temperature), (D,): by size at 1, nearly even at high temperatures.

    In logarithms, so that no power overflows; a source of size 0 gets 0.
    """
    shares = normalised(sizes, "sizes")
    if not temperature > 0:
        raise RequestError(f"temperature must be above 0, got {temperature}")
    return (shares.log() / temperature).softmax(0)


def smoothed(weights: Tensor, floor: float, among: Tensor | None = None) -> Tensor:
    """(1 - floor) w + floor / D for the D sources ``among``, (D,) bool, all if not given.

    No source of these falls below ``floor / D``; a source that is left out stays out.
    """
    among = torch.ones_like(weights, dtype=torch.bool) if among is None else among
    mixed = (1 - floor) * weights + floor * among / among.sum()
    return mixed / mixed.sum()


def differences(loads: Tensor, *, distance: str = "l2", criterion: str = "mean") -> Tensor:
    """How much the gate loads of each source differ from those of the others: (D, E) -> (D,).

    loads: (D, E), rows of any scale; each is normalised to sum 1, so that a long source counts as
    a short one. "mean" divides by D with the self term of 0 included, as published; "min" and
    "max" are over the other sources. "cosine" is 1 minus the cosine.
    (Zhu et al., arXiv 2406.11256, Algorithm 1; github.com/Spico197/MoE-SFT.)
    Raises RequestError for loads that are negative or not finite, and for a source without any.
    """
    if distance not in DISTANCES:
        raise unknown("distance", distance, DISTANCES)
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    wide = loads.detach().cpu().to(torch.float64)
    if wide.ndim != 2 or not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        raise RequestError(
            "loads must be (sources, experts), finite and not negative, got shape "
            f"{tuple(wide.shape)}"
        )
    if not bool((wide.sum(1) > 0).all()):
        empty = (wide.sum(1) == 0).nonzero().flatten().tolist()
        raise RequestError(f"no token of the sources {empty} reached an expert: nothing to compare")
    shares = wide / wide.sum(1, keepdim=True)
    if distance == "l2":
        apart = (shares[:, None] - shares[None]).norm(dim=-1)
    else:
        length = shares.norm(dim=1)
        apart = 1 - (shares @ shares.T) / (length[:, None] * length[None])
        apart.fill_diagonal_(0)
    count = apart.shape[0]
    if criterion == "mean":
        mean: Tensor = apart.sum(1) / count
        return mean
    if count == 1:
        return torch.zeros(1, dtype=torch.float64)
    others = apart[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    found: Tensor = others.amin(1) if criterion == "min" else others.amax(1)
    return found


def raised(weights: Tensor, signal: Tensor, eta: float, floor: float) -> Tensor:
    """softmax(log w + eta * signal), smoothed; a source of weight 0 stays out.

    weights, signal: (D,). With last time's weights for ``weights`` this is the published update of
    gate-load mixing (eta 10, floor 0.05) and of the reference-loss rule (eta 1, floor 1e-4), whose
    log-odds grow with every update at a constant signal; with the first weights it is anchored.
    """
    return smoothed((weights.log() + eta * signal).softmax(0), floor, weights > 0)


def sheared(weights: Tensor, losses: Tensor, reference: Tensor) -> Tensor:
    """w * exp(max(0, loss - reference)), normalised; all (D,).

    Sheared-LLaMA's rule as its paper gives it (Xia et al., arXiv 2310.06694, Algorithm 1). Its
    released code has neither the maximum with 0 nor weights without a floor: that is ``raised``
    with eta 1 and floor 1e-4.
    """
    return (weights.log() + (losses - reference).clamp(min=0)).softmax(0)


def bounds(
    start: Tensor, eta: float, floor: float, widest: float = math.sqrt(2)
) -> tuple[Tensor, Tensor]:
    """The least and most that anchored weights can be while 0 <= signal < ``widest``; (D,) each.

    A mean of l2 distances between distributions is below sqrt(2).
    """
    gain = math.exp(eta * widest)
    least, most = start / (start + (1 - start) * gain), start * gain / (start * gain + 1 - start)
    count = start.numel()
    return (1 - floor) * least + floor / count, (1 - floor) * most + floor / count
