"""Scores that rank entries by how long they survive a falling schedule of masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.weights.masks import Layers, nested
from sparing.weights.patterns import Pattern, Units
from sparing.weights.scores.gradients import Named


def by_survival(
    score: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    named: Named,
    keeps: list[float],
    *,
    scope: str,
    pattern: str,
    layer_of: Layers | None,
    units: Units | None,
) -> dict[str, Tensor]:
    """Choose anew at each of the falling shares; ``score`` gives non-negative scores within masks.

    What survives all T steps has its last score, what fell at step t has t - T - 1. So ``masks``
    with the last share and the same scope, pattern, layers and units gives the survivors, exactly.
    A pattern N:M has no shares but its own, so there it is one step.
    """
    if Pattern.parse(pattern).kind == "n:m":
        keeps = keeps[-1:]
    last: dict[str, Tensor] = {}

    def noted(within: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(score(within))
        return last

    steps = nested(
        noted, named, keeps, scope=scope, pattern=pattern, layer_of=layer_of, units=units
    )
    ranked = {name: torch.full_like(found, -len(steps)) for name, found in last.items()}
    for step in steps[:-1]:
        for name, mask in step.items():
            ranked[name] += mask
    return {name: torch.where(steps[-1][name], last[name], ranked[name]) for name in named}


@torch.no_grad()
def mask_(named: Named, within: Mapping[str, Tensor]) -> None:
    """Zero what the masks leave out; inside ``looking``. Raises RequestError for a missing mask."""
    for name, parameter in named.items():
        if name not in within or within[name].shape != parameter.shape:
            raise RequestError(
                f'within has no mask of the shape {tuple(parameter.shape)} of "{name}"'
            )
        parameter.mul_(within[name].to(parameter.device))
