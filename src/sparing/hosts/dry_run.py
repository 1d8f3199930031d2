"""One batch through every seam, on copies: what would fail at step 1 fails before any spending."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparing.core.clock import Clock
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Context, Method, combine
from sparing.core.random_state import random_state, set_random_state_


def rehearse(
    model: nn.Module,
    methods: list[Method],
    *,
    clock: Clock,
    bound: dict[str, Any],
    first: Callable[[list[Method]], tuple[Any, Context]],
    losses: Callable[[nn.Module, Any], tuple[Tensor, Any]],
    device: torch.device,
    part: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> None:
    """Weights, buffers, generators, the methods' state and the clock stay as they were.

    ``first(methods)`` makes the first batch with the methods given, ``losses(model, batch)`` its
    losses (B,) and outputs; ``bound`` is what the host tells methods by ``bind``, ``part(model)``
    the model that they know where a trainer's module stands around it. Raises
    RequestError for losses of another shape or that are not finite, and whatever a seam raises.
    """
    clock = copy.copy(clock)
    kept = random_state()
    model, methods = copy.deepcopy((model, methods))
    try:
        for method in methods:
            method.bind(**bound, model=part(model))
        model.to(device).train()
        batch, context = first(methods)
        each, outputs = losses(model, batch)
        _check(each, context)
        torch.autograd.backward(combine(methods, each, context, outputs))
        clock.step, spent = 1, Ledger()
        for method in methods:
            method.grads(part(model).named_parameters(), context)
            method.step(clock, None)
            method.account(spent)
    finally:
        set_random_state_(kept)


def _check(losses: Tensor, context: Context) -> None:
    if losses.shape != context.index.shape[:1]:
        raise RequestError(
            f"losses(model, batch) must give one loss for each of the {context.index.shape[0]} "
            f"samples, got shape {tuple(losses.shape)}; reduce over everything but the batch "
            '(reduction="none")'
        )
    if not torch.isfinite(losses).all():
        raise RequestError(
            f"the first batch's losses are not finite: {losses.detach().tolist()}; check the data "
            "and the model's initialisation"
        )
