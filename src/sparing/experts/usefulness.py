"""How much an expert matters: what changes when it alone is masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparing.core.ranks import mean_, sum_

if TYPE_CHECKING:
    from sparing.experts.layer import ExpertLayer
    from sparing.experts.router import Router
    from sparing.experts.routing import Routing


@contextmanager
def masked(router: Router, expert: int) -> Iterator[None]:
    """A context in which ``expert`` is switched off and its tokens go where they then would."""
    was = router.active[expert].clone()
    router.active[expert] = False
    try:
        yield
    finally:
        router.active[expert] = was


@torch.no_grad()
def _outputs(layer: ExpertLayer, x: Tensor) -> tuple[Tensor, Routing]:
    """The layer's outputs at inference for x: (n, d), past its record and its masks."""
    training = layer.router.training
    layer.router.eval()
    x = x.to(layer.experts.up.dtype)  # under autocast it was recorded in the lower precision
    try:
        routing = layer.router(x)
        y: Tensor = layer.experts(x, routing)
    finally:
        layer.router.train(training)
    return y.double(), routing


@torch.no_grad()
def output_changes(layers: list[ExpertLayer], inputs: list[Tensor]) -> list[Tensor]:
    """For each layer (E,) float64: the relative change of its output when an expert is masked.

    Squared norm of the change over that of the output, on each layer's inputs: (n, d), summed over
    ranks; infinite for inactive slots, and for the only expert of a layer. Measures function, not
    load: an expert whose tokens another expert would serve alike scores 0 however busy it is.
    """
    sums: list[Tensor] = []
    for layer, x in zip(layers, inputs, strict=True):
        slots = layer.router.active.numel()
        change = torch.zeros(slots + 1, dtype=torch.float64, device=x.device)
        if x.shape[0] and int(layer.router.active.sum()) > 1:
            whole, routing = _outputs(layer, x)
            change[slots] = whole.square().sum()
            # tokens do not depend on each other, so only the expert's own are computed again
            for expert, tokens in enumerate(torch.split(routing.tokens, routing.counts.tolist())):
                if tokens.numel():
                    with masked(layer.router, expert):
                        other, _ = _outputs(layer, x[tokens])
                    change[expert] = (other - whole[tokens]).square().sum()
        sums.append(change)
    sum_(sums)
    found = []
    for layer, change in zip(layers, sums, strict=True):
        relative = change[:-1] / change[-1].clamp_min(torch.finfo(torch.float64).tiny)
        active = layer.router.active
        known = active if int(active.sum()) > 1 else torch.zeros_like(active)
        found.append(relative.masked_fill(~known, torch.inf))
    return found


@torch.no_grad()
def loss_of(probe: Callable[[], Tensor | float]) -> float:
    """The probe's loss, mean over ranks."""
    value = torch.as_tensor(probe(), dtype=torch.float64).detach().clone().reshape(())
    mean_([value])
    return float(value)


def loss_change(
    probe: Callable[[], Tensor | float], base: float, router: Router, expert: int
) -> float:
    """Relative change of the probe's loss from ``base`` when ``expert`` is masked."""
    with masked(router, expert):
        changed = loss_of(probe)
    return (changed - base) / max(abs(base), 1e-12)
