"""Scores that need no data: at random, and by magnitude."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.weights.scores.gradients import Loss, Named, normalised, zero_factors

SHOWN = 4


def random(
    model: nn.Module | None,
    named: Named,
    batches: Iterable[Any] = (),
    loss: Loss | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Uniform in [0, 1), float32; model, batches and loss are not looked at.

    Drawn on the CPU in the order of ``named`` from an own generator: the same seed gives the same
    scores on every device and for every dtype of the parameters.
    """
    _require_some(named)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator).to(parameter.device)
        for name, parameter in named.items()
    }


def magnitude(
    model: nn.Module | None,
    named: Named,
    batches: Iterable[Any] = (),
    loss: Loss | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """|w| in float32; model, batches and loss are not looked at.

    It says nothing of a tensor that is all zero. If there is one, its ties are broken by
    ``seed`` (uniform draws), every tensor's scores are divided by their mean, so that such a
    tensor is not dropped as a whole, and a UserWarning names it.
    """
    _require_some(named)
    scores = {name: wide(parameter).abs() for name, parameter in named.items()}
    zeros = zero_factors(named, None)
    if not zeros:
        return scores
    more = f" and {len(zeros) - SHOWN} more" if len(zeros) > SHOWN else ""
    warnings.warn(
        f"magnitude says nothing of {', '.join(zeros[:SHOWN])}{more}: all entries are 0. They are "
        f"scored at random, by seed; the score snip has a defined score for them",
        stacklevel=2,
    )
    drawn = random(model, {name: named[name] for name in zeros}, seed=seed)
    return normalised(scores | {name: drawn[name].to(scores[name].dtype) for name in zeros})


def wide(parameter: Tensor) -> Tensor:
    """A detached copy in float32, or in float64 if it is that already."""
    kind = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return parameter.detach().to(kind, copy=True)


def _require_some(named: Named) -> None:
    if not named:
        raise RequestError("there is nothing to score; name at least one parameter")
