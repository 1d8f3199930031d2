"""SNIP: how much the loss would change if an entry went, once and in steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from sparing.weights.masks import Layers, require_finite, shares
from sparing.weights.patterns import Units
from sparing.weights.scores.gradients import (
    Loss,
    Named,
    mean_gradients,
    normalised,
    step_zeros_,
    zero_factors,
)
from sparing.weights.scores.looking import looking
from sparing.weights.scores.survival import by_survival, mask_


def snip(
    model: nn.Module,
    named: Named,
    batches: Iterable[Any],
    loss: Loss,
    *,
    zero: Iterable[str] | None = None,
    within: Mapping[str, Tensor] | None = None,
    normalise: bool | None = None,
) -> dict[str, Tensor]:
    """|w * dL/dw| of the mean loss over all batches: connection sensitivity (Lee et al. 2019).

    Scores are float32 (float64 of float64 parameters), in the order and shapes of ``named``. The
    model is left as it was: see ``looking``, which also says in which mode it is scored.

    loss: ``loss(model, batch)``, a mean over the samples of the batch, one number.
    zero: parameters that begin at zero, as LoRA's B does; None finds those that are all 0. With
    B = 0 both w * dL/dw of B and dL/dA are 0. So these are moved by one virtual step against
    their gradient, and the scores are taken there; with B = -s * dL/dB, of B they are in
    proportion to (dL/dB)^2, of A to |A * (dL/dB)^T dL/d(BA)|, for small s.
    normalise: divide each tensor's scores by their mean; None does so if there is a zero factor,
    whose scale is that of the step.
    within: masks; entries outside count as 0 in the model and score 0.

    Raises RequestError for no batch, unknown names and a loss that depends on none of them,
    RunError for a loss that is not finite.
    """
    with looking(model, named, batches):
        zeros = zero_factors(named, zero)
        if within is not None:
            mask_(named, within)
        if zeros:
            batches = list(batches)
            before = mean_gradients(model, named, batches, loss)
            step_zeros_(named, before, zeros, within)
        gradients = mean_gradients(model, named, batches, loss)
        scores = {name: (p.detach() * gradients[name]).abs() for name, p in named.items()}
    require_finite(scores)
    return normalised(scores) if normalise or (normalise is None and zeros) else scores


def iterative_snip(
    model: nn.Module,
    named: Named,
    batches: Iterable[Any],
    loss: Loss,
    *,
    keep: float,
    steps: int = 5,
    schedule: str = "exponential",
    scope: str = "global",
    pattern: str = "entry",
    layer_of: Layers | None = None,
    units: Units | None = None,
    zero: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """SNIP in steps from dense to ``keep``, each without what fell before, never to come back.

    Iterative SNIP (de Jorge et al. 2021). The scores rank by survival: what survives all steps has
    its last SNIP score, what fell at step t of T has t - T - 1. So ``masks`` with the same keep,
    scope, pattern, layers and units gives the survivors, exactly. Other arguments as in
    ``snip`` and ``sparing.weights.masks.shares``; raises what these raise.
    """
    with looking(model, named, batches):
        held = list(batches)
    zeros = zero_factors(named, zero)

    def score(within: dict[str, Tensor]) -> dict[str, Tensor]:
        return snip(model, named, held, loss, zero=zeros, within=within)

    return by_survival(
        score,
        named,
        shares(keep, steps, schedule=schedule),
        scope=scope,
        pattern=pattern,
        layer_of=layer_of,
        units=units,
    )
