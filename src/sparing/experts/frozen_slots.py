"""Slots without an expert stay as they are, whatever the optimizer does."""

from __future__ import annotations

import threading
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


_guards: weakref.WeakSet[FrozenSlots] = weakref.WeakSet()
_lock = threading.RLock()
_registered = False


def _living() -> list[FrozenSlots]:
    with _lock:  # a set that grows in another thread cannot be walked
        return list(_guards)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for guard in _living():
        guard.before_step(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for guard in _living():
        guard.after_step(optimizer)


def _watch(guard: FrozenSlots) -> None:
    # The two hooks are registered once and stay: a hook that left with its guard would be taken
    # out by garbage collection, which may come while torch walks its hooks in some other step.
    global _registered
    with _lock:
        _guards.add(guard)
        if not _registered:
            register_optimizer_step_pre_hook(_before_step)
            register_optimizer_step_post_hook(_after_step)
            _registered = True


@final
class FrozenSlots:
    """Puts inactive slots, weights and moments, back after each step of any torch optimizer.

    Weight decay and momentum move a parameter whose gradient is zero, so a slot would drift while
    it holds no expert. Costs one copy of the inactive rows a step; nothing while all slots are
    active. The hooks are torch's process-wide ones, because the optimizer is built later and by
    others; a guard acts only on optimizers that hold one of its layers' parameters, and ends with
    this object.
    """

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self.layers = list(layers)
        # by the optimizer in whose step they are kept: steps of several may overlap in threads
        self._kept: dict[int, list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Tensor]]]] = {}
        _watch(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self._kept = state["layers"], {}
        _watch(self)

    def remove(self) -> None:
        """Let inactive slots drift from now on."""
        with _lock:
            _guards.discard(self)

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the inactive rows of the parameters that ``optimizer`` is about to step."""
        kept = []
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
                kept.append((parameter, idle, parameter[idle], rows))
        self._kept[id(optimizer)] = kept

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back what was kept before the step."""
        for parameter, idle, weight, rows in self._kept.pop(id(optimizer), []):
            parameter[idle] = weight
            for name, value in moments(optimizer, parameter).items():
                # state that this very step created was zero before it
                value[idle] = rows[name] if name in rows else torch.zeros_like(value[idle])
