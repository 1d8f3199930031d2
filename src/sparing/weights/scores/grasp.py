"""GraSP: how much the flow of the gradient would suffer if an entry went."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparing.core.errors import unknown
from sparing.weights.masks import require_finite
from sparing.weights.scores.batches import size
from sparing.weights.scores.gradients import (
    Loss,
    Named,
    loss_of,
    mean_gradients,
    mean_over_ranks,
    normalised,
    zero_factors,
)
from sparing.weights.scores.looking import looking

PRODUCTS = ("exact", "differences")


def grasp(
    model: nn.Module,
    named: Named,
    batches: Iterable[Any],
    loss: Loss,
    *,
    zero: Iterable[str] | None = None,
    product: str = "exact",
) -> dict[str, Tensor]:
    """w * (H g): signed, the highest are kept (Wang et al. 2020, who remove the highest -w * Hg).

    g and H are gradient and Hessian of the mean loss over all batches, in the named parameters.
    To first order, without w the squared length of the gradient changes by -2 w * Hg, so what is
    kept is what the gradient lives on.

    product: "exact" differentiates twice (attention in plain operations, since the fused kernels
    have no second derivative); "differences" compares gradients at w + h g and w - h g: it works
    with any operation and needs the memory of one backward pass.
    The paper divides the logits by a temperature of 200; a ``loss`` may do so.

    zero: parameters that begin at zero (None: those that are all 0). There w * Hg is 0 whatever
    the entry is worth; what the gradient loses when such an entry stays at 0 is its own square.
    So g^2 is their score, and each tensor's scores are divided by their mean absolute value. The
    factor before needs nothing: of LoRA's A, at B = 0, w * Hg is A * (dL/dB)^T dL/d(BA).

    The state of the model, the dtype of the scores and the errors are as in ``snip``.
    """
    if product not in PRODUCTS:
        raise unknown("product", product, PRODUCTS)
    with looking(model, named, batches), sdpa_kernel(SDPBackend.MATH):
        zeros = zero_factors(named, zero)
        held = list(batches)
        gradients = mean_gradients(model, named, held, loss)
        work = _exact if product == "exact" else _differences
        products = work(model, named, held, loss, gradients)
        scores = {name: p.detach() * products[name] for name, p in named.items()}
        scores |= {name: gradients[name].square() for name in zeros}
    require_finite(scores)
    return normalised(scores) if zeros else scores


def _exact(
    model: nn.Module, named: Named, held: list[Any], loss: Loss, along: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The Hessian of the mean loss times a vector, by differentiating gradient . vector."""
    parameters = list(named.values())
    sums = {name: torch.zeros_like(v) for name, v in along.items()}
    weight = 0
    for number, batch in enumerate(held):
        value = loss_of(model, batch, loss, number)
        first = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
        dots = [
            (gradient * vector).sum()
            for gradient, vector in zip(first, along.values(), strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        count = size(batch)
        weight += count
        if not dots:  # a loss that is linear in all of them has no curvature
            continue
        second = torch.autograd.grad(torch.stack(dots).sum(), parameters, allow_unused=True)
        for total, gradient in zip(sums.values(), second, strict=True):
            if gradient is not None:
                total.add_(gradient, alpha=count)
    return mean_over_ranks(sums, weight)


def _differences(
    model: nn.Module, named: Named, held: list[Any], loss: Loss, along: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The same by central differences; the error falls with the square of the step."""
    length = math.sqrt(sum(float(v.double().square().sum()) for v in along.values()))
    if length == 0:
        return {name: torch.zeros_like(vector) for name, vector in along.items()}
    size_ = math.sqrt(sum(float(p.detach().double().square().sum()) for p in named.values()))
    precision = max(torch.finfo(p.dtype).eps for p in named.values())
    # balances the truncation of the difference with the rounding of the gradients
    step = precision ** (1 / 3) * max(size_, 1e-3) / length
    start = {name: p.detach().clone() for name, p in named.items()}

    def at(sign: float) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(start[name] + sign * step * along[name])
        return mean_gradients(model, named, held, loss)

    ahead, behind = at(1.0), at(-1.0)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
    return {name: (ahead[name] - behind[name]) / (2 * step) for name in named}
