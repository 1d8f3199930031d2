"""Slots without an expert stay as they are, whatever the optimizer does."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

if TYPE_CHECKING:
    from sparing.experts.layer import ExpertLayer


def slot_parameters(layer: ExpertLayer) -> list[nn.Parameter]:
    """The layer's parameters whose axis 0 is the expert slot: the experts' and the router's."""
    return [*layer.experts.slots().values(), *layer.router.slots().values()]


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers that keep it as ``optimizer`` (Accelerate does)."""
    # a wrapper may itself be a torch.optim.Optimizer by inheritance, so the attribute decides
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    inner: torch.optim.Optimizer = optimizer
    return inner


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state tensors of ``parameter`` that have its slot axis, by name."""
    return {
        name: value
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == parameter.shape[0]
    }


@torch.no_grad()
def clear_moments_(optimizer: Any, parameters: Iterable[nn.Parameter], slot: int) -> None:
    """Set the optimizer's moments of one slot to zero, as they are for a new parameter."""
    inner = unwrap(optimizer)
    for parameter in parameters:
        for value in moments(inner, parameter).values():
            value[slot] = 0


@final
class FrozenSlots:
    """Puts inactive slots, weights and moments, back after each step of any torch optimizer.

    Weight decay and momentum move a parameter whose gradient is zero, so a slot would drift while
    it holds no expert. Costs one copy of the inactive rows a step; nothing while all slots are
    active. The hooks are torch's process-wide ones, because the optimizer is built later and by
    others; they act only on optimizers that hold one of these layers' parameters, and end with
    this object.
    """

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self.layers = list(layers)
        self._kept: list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Tensor]]] = []
        self._watch()

    def _watch(self) -> None:
        before, after = weakref.WeakMethod(self._before), weakref.WeakMethod(self._after)

        def pre(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if (method := before()) is not None:
                method(optimizer)

        def post(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if (method := after()) is not None:
                method(optimizer)

        handles = (register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post))

        def end() -> None:
            for handle in handles:
                handle.remove()

        self._ended = weakref.finalize(self, end)

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self._kept = state["layers"], []
        self._watch()

    def remove(self) -> None:
        """Let inactive slots drift from now on."""
        self._ended()

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        self._kept = []
        held: set[int] | None = None
        for layer in self.layers:
            idle = (~layer.router.active).nonzero().squeeze(1)
            if idle.numel() == 0:
                continue
            if held is None:
                held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for parameter in slot_parameters(layer):
                if parameter.grad is None or id(parameter) not in held:
                    continue  # the optimizer leaves it alone
                state = moments(optimizer, parameter)
                rows = {name: value[idle] for name, value in state.items()}
                self._kept.append((parameter, idle, parameter[idle], rows))

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, idle, weight, rows in self._kept:
            parameter[idle] = weight
            for name, value in moments(optimizer, parameter).items():
                # state that this very step created was zero before it
                value[idle] = rows[name] if name in rows else torch.zeros_like(value[idle])
        self._kept = []
