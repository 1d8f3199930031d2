"""What a task says of a model, from the scores of its held-out documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparing.core.modes import evaluating
from sparing.tasks.causal import device_of


class Held(Protocol):
    """Held-out samples: how many, a batch of some, and the domain of each, (n,) int64."""

    source: Tensor

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The samples ``index``, (B,) int64."""


def means(metric: str, documents: Mapping[str, Tensor]) -> dict[str, float]:
    """The domains' mean under the metric's name, and each domain's under ``metric/domain``."""
    scores = {name: float(each.mean()) for name, each in documents.items()}
    named = {f"{metric}/{name}": score for name, score in scores.items()}
    return {metric: sum(scores.values()) / len(scores), **named}


def by_domain(
    model: nn.Module,
    losses: Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Any]],
    held: Held,
    domains: Sequence[str],
    size: int,
) -> dict[str, Tensor]:
    """The loss of each held-out sample, ``size`` at a time: (n,) float64 each, on the CPU."""
    device = device_of(model)
    parts = []
    with evaluating(model):
        for index in torch.split(torch.arange(len(held)), size):
            batch = {key: part.to(device) for key, part in held.batch(index).items()}
            parts.append(losses(model, batch)[0].double().cpu())
    each = torch.cat(parts)
    return {name: each[held.source == place] for place, name in enumerate(domains)}
