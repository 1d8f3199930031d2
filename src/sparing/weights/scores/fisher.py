"""The diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparing.weights.masks import require_finite
from sparing.weights.scores.batches import samples
from sparing.weights.scores.gradients import (
    Loss,
    Named,
    loss_of,
    mean_gradients,
    mean_over_ranks,
    normalised,
    step_zeros_,
    zero_factors,
)
from sparing.weights.scores.looking import looking


def fisher(
    model: nn.Module,
    named: Named,
    batches: Iterable[Any],
    loss: Loss,
    *,
    zero: Iterable[str] | None = None,
    by_sample: bool = True,
) -> dict[str, Tensor]:
    """The mean over samples of (dL_i/dw)^2 (Sung et al. 2021, with the labels that are given).

    by_sample: differentiates each sample by itself, B backward passes for a batch of B; else
    the squares of whole batches' gradients, which is cheaper and a different score: gradients that
    cancel within a batch count for nothing.

    It needs no w, so a factor that is zero has a score; but then the factor before it has no
    gradient. So ``zero``, the normalisation that it brings, the state of the model, the dtype of
    the scores and the errors are as in ``snip``.
    """
    with looking(model, named, batches):
        zeros = zero_factors(named, zero)
        if zeros:
            batches = list(batches)
            step_zeros_(named, mean_gradients(model, named, batches, loss), zeros)
        sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in named.items()}
        count = 0
        for number, batch in enumerate(batches):
            for part in samples(batch) if by_sample else [batch]:
                value = loss_of(model, part, loss, number)
                found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
                for total, gradient in zip(sums.values(), found, strict=True):
                    if gradient is not None:
                        total.add_(gradient.square())
                count += 1
        scores = mean_over_ranks(sums, count)
    require_finite(scores)
    return normalised(scores) if zeros else scores
