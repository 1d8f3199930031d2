"""A tick: what is looked at, and the weights that come of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.samples import draw
from sparing.samples import mixing_weights as weighing
from sparing.samples.mixing_probe import look

if TYPE_CHECKING:
    from sparing.samples.mix import Mix


def updated(mix: Mix) -> tuple[Tensor, Tensor | None]:
    """New weights, (D,), and the signal that they follow, (D,), None where there is none."""
    options, open_ = mix.options, mix.start > 0
    if options.rule == "random":
        random = draw.generator(mix.seed, 2**33 + mix.ticks)
        drawn = torch.from_numpy(random.dirichlet(np.ones(len(mix.names)))) * open_
        return weighing.smoothed(drawn / drawn.sum(), options.least, open_), None
    losses, loads = _looked(mix)
    if options.rule == "gate-load":
        if not loads:
            raise RequestError('rule "gate-load" found no expert layer to look at')
        signal = _apart(mix, loads[-1:] if options.layers == "last" else loads)
    else:
        assert mix.reference is not None
        # of a source that has shown no loss yet nothing is known: it is taken to be at its goal
        known = torch.where(torch.isfinite(losses), losses, mix.reference)
        signal = known - mix.reference
        if options.rule == "sheared" and options.formed != "released":
            signal = signal.clamp(min=0)
    from_ = mix.start if options.formed == "anchored" else mix.weights
    return weighing.raised(from_, signal, options.strength, options.least), signal


def _apart(mix: Mix, loads: list[Tensor]) -> Tensor:
    """How far each source's loads are from the others', the mean over layers; (D,)."""
    held = torch.from_numpy(mix.members.sizes > 0)
    total = torch.zeros(len(mix.names), dtype=torch.float64)
    for layer in loads:
        if layer.ndim != 2 or layer.shape[0] != len(mix.names):
            raise RequestError(
                f"gate loads must be ({len(mix.names)} sources, experts), got shape "
                f"{tuple(layer.shape)}"
            )
        total[held] += weighing.differences(
            layer[held], distance=mix.options.distance, criterion=mix.options.criterion
        )
    return total / len(loads)


def _looked(mix: Mix) -> tuple[Tensor, list[Tensor]]:
    """Losses (D,), and loads (D, E) by layer; what the rule does not read may be missing."""
    options = mix.options
    if mix.measure is not None:
        told = mix.measure(mix.model)
        losses = torch.as_tensor(told.get("losses", mix.losses.latest), dtype=torch.float64)
        given = told.get("loads", [])
        parts = [given] if isinstance(given, Tensor) and given.ndim == 2 else list(given)
        return losses, [torch.as_tensor(part) for part in parts]
    if options.rule != "gate-load" and options.losses == "training":
        return mix.losses.latest, []
    setup = mix.setup
    assert mix.model is not None
    assert setup is not None
    assert setup.loss is not None
    assert setup.read is not None
    found = look(
        mix.model,
        mix.members,
        read=setup.read,
        loss=setup.loss,
        samples=options.probe_samples,
        seed=mix.seed,
        tick=mix.ticks,
    )
    mix.seen += options.probe_samples * len(mix.names)
    return found
