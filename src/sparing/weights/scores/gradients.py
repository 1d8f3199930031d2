"""Gradients of the loss over all batches, and the virtual step of factors that begin at zero."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparing.core import ranks
from sparing.core.errors import RequestError, RunError
from sparing.weights.adapter import CHILD
from sparing.weights.scores.batches import size, tensors, widened

Loss = Callable[[nn.Module, Any], Tensor]
Named = Mapping[str, nn.Parameter]

STEP = 1e-4
"""Root mean square of the virtual step; to first order no score depends on it."""


def mean_gradients(
    model: nn.Module, named: Named, batches: Iterable[Any], loss: Loss
) -> dict[str, Tensor]:
    """The gradient of the mean loss over all samples: batches weigh by their number of samples.

    So batches of any sizes give what one large batch would, if the loss is a mean over samples; and
    so do ranks that each bring their own batches, which all call this together.
    Works inside ``looking``. Raises RequestError for no batch and for a loss that depends on no
    named parameter, RunError for a loss that is not finite.
    """
    sums = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    reached: set[str] = set()
    weight = 0
    for number, batch in enumerate(batches):
        value = loss_of(model, batch, loss, number)
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        count = size(batch)
        weight += count
        for (name, total), gradient in zip(sums.items(), found, strict=True):
            if gradient is not None:
                total.add_(gradient, alpha=count)
                reached.add(name)
    means = mean_over_ranks(sums, weight)
    _warn_of_unreached(named, reached)
    return means


def mean_over_ranks(sums: dict[str, Tensor], weight: int) -> dict[str, Tensor]:
    """The sums of all ranks, divided by their weight together; one collective.

    Raises RequestError on every rank if no rank had a batch.
    """
    total = torch.tensor(weight)
    ranks.sum_([*sums.values(), total])
    if int(total) == 0:
        raise RequestError("there is no batch to score by; the data is empty")
    return {name: found / int(total) for name, found in sums.items()}


def loss_of(model: nn.Module, batch: Any, loss: Loss, number: int) -> Tensor:
    """The loss of one batch, checked. Raises as ``mean_gradients`` says."""
    value = loss(model, widened(batch))
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RequestError(f"loss(model, batch) must give one number as a tensor, got {what}")
    if not math.isfinite(float(value.detach())):
        raise RunError(
            f"the loss of scoring batch {number} is {float(value.detach())}"
            f"{_where(model, widened(batch), loss)}; no parameter can be scored by it: check the "
            f"data and the model"
        )
    if not value.requires_grad:
        raise RequestError(
            "the loss depends on none of the parameters that are to be scored; return the loss "
            "of the model given to loss(model, batch), without detaching it"
        )
    return value.reshape(())


@torch.no_grad()
def _where(model: nn.Module, batch: Any, loss: Loss) -> str:
    """Which module is the first to give what is not finite, for a message; "" for none."""
    found: list[str] = []

    def seen(name: str) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(bool(t.isfinite().all()) for t in tensors(output)):
                found.append(name.partition(f".{CHILD}")[0])  # of an adapter, what it adapts

        return see

    handles = [
        module.register_forward_hook(seen(name)) for name, module in model.named_modules() if name
    ]
    try:
        loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return f' (the first layer whose output is not finite is "{found[0]}")' if found else ""


def zero_factors(named: Named, zero: Iterable[str] | None) -> list[str]:
    """The named parameters that begin at zero: as given, or all whose entries are all 0.

    Raises RequestError for a name that is not among the named.
    """
    if zero is None:
        return [name for name, p in named.items() if p.numel() and not bool(p.detach().any())]
    given = list(zero)
    for name in given:
        if name not in named:
            raise RequestError(f'zero names "{name}", which is not among the scored parameters')
    return given


@torch.no_grad()
def step_zeros_(
    named: Named,
    gradients: Mapping[str, Tensor],
    zeros: Iterable[str],
    within: Mapping[str, Tensor] | None = None,
) -> None:
    """Move the zero factors against their gradients by ``STEP`` (root mean square over all).

    Works inside ``looking``, on the copies. All move by one common rate: the common scale cancels
    where scores are normalised by tensor, the proportions among the factors do not.
    Raises RequestError if all these gradients are 0: then nothing tells their entries apart.
    """
    names = list(zeros)
    moves = {name: gradients[name] for name in names}
    if within is not None:
        moves = {name: move * within[name].to(move.device) for name, move in moves.items()}
    square = sum(float(move.double().square().sum()) for move in moves.values())
    count = sum(move.numel() for move in moves.values())
    if square == 0:
        raise RequestError(
            f"{', '.join(names)} are all zero and so are their gradients; nothing tells their "
            f"entries apart: give data that reaches them, or use the score random"
        )
    for name in names:
        named[name].sub_(moves[name], alpha=STEP / math.sqrt(square / count))


def normalised(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor's scores divided by the mean of their absolute values, so that it is 1.

    A tensor of zeros stays so. The mean, not the sum: a large tensor is not put behind.
    """
    found = {}
    for name, score in scores.items():
        mean = score.abs().mean(dtype=torch.float64) if score.numel() else torch.zeros(())
        found[name] = score if float(mean) == 0 else (score / mean).to(score.dtype)
    return found


def _warn_of_unreached(named: Named, reached: set[str]) -> None:
    missed = [name for name in named if name not in reached]
    if missed:
        warnings.warn(
            f"the loss does not depend on {', '.join(missed)}: the scores there are 0",
            stacklevel=4,
        )
