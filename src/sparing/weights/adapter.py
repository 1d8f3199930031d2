"""What adapts one module, and how it is attached: a child module and two hooks.

The adapted module keeps its class, its name and its parameters, so that code which reads its
weight, state dicts of the base and further adapters all stay valid. The hooks are functions of
this file, which find their adapter on the module: copies and pickles hold no reference to another.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.weights.factor import Factor

CHILD = "sparing_adapters"
"""The name of the child module that holds a module's adapters."""


class Adapter(nn.Module, abc.ABC):
    """Abstract: changes what one module takes or gives, by trained factors.

    Subclasses name their factors, and override ``before`` or ``after``.
    """

    kind: ClassVar[str]
    factors: ClassVar[tuple[str, ...]]
    """Attributes that are Factors, in the order in which they act."""
    units: ClassVar[tuple[tuple[tuple[str, int], ...], ...]] = ()
    """Groups of (factor, axis) that share one axis of units, dropped as a whole or not at all."""
    mergeable: ClassVar[bool] = False
    beside_dense: ClassVar[bool] = True
    """Left out where the FLOPs of training the whole base are counted."""

    def named_factors(self) -> Iterator[tuple[str, Factor]]:
        """Its factors by name."""
        for name in self.factors:
            yield name, getattr(self, name)

    def plain_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that are never masked, such as biases, by their own names."""
        owned = {id(factor.values) for _, factor in self.named_factors()}
        for name, parameter in self.named_parameters():
            if id(parameter) not in owned:
                yield name, parameter

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """What ``built`` needs beside the tensors to make the same adapter, as plain data."""

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Change what the module takes."""
        return args, kwargs

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Change what the module gives."""
        return output

    def shrunk_(self, group: int, units: Tensor) -> None:
        """What else depends on the units of a group shrinks with the factors (biases)."""

    def attached_(self, module: nn.Module) -> None:
        """Called once the adapter stands in its place."""

    def removed_(self, module: nn.Module) -> None:
        """Called once the adapter has left its place."""

    def delta(self, module: nn.Module) -> Tensor:
        """What to add to the module's weight, in its layout; only where ``mergeable``."""
        raise RequestError(f'adapters of kind "{self.kind}" cannot be merged into weights')


@final
class Place(nn.Module):
    """The adapters of one module by name: which of them act, which are merged into its weight."""

    original: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        self.merged: list[str] = []
        self.register_buffer("original", None, persistent=False)

    def acting(self) -> Iterator[Adapter]:
        """The active adapters that are not merged already, in the order of activation."""
        for name in self.active:
            if name not in self.merged and name in self.adapters:
                adapter = self.adapters[name]
                assert isinstance(adapter, Adapter)
                yield adapter


def place_of(module: nn.Module) -> Place | None:
    """What adapts the module, if anything does."""
    found = module._modules.get(CHILD)
    return found if isinstance(found, Place) else None


def places(model: nn.Module) -> dict[str, tuple[nn.Module, Place]]:
    """All adapted modules of a model with what adapts them, by the module's name."""
    found = {}
    for name, module in model.named_modules():
        place = place_of(module)
        if place is not None:
            found[name] = (module, place)
    return found


def adapters(model: nn.Module, name: str) -> dict[str, Adapter]:
    """The parts of the adapter ``name``, by the name of the module that each adapts."""
    found: dict[str, Adapter] = {}
    for path, (_, place) in places(model).items():
        part = dict(place.adapters.items()).get(name)
        if isinstance(part, Adapter):
            found[path] = part
    return found


def attach_(module: nn.Module, path: str, name: str, adapter: Adapter) -> None:
    """Give ``module`` (called ``path`` in messages) a further adapter, not active yet.

    Raises RequestError for containers that call or iterate their children, and for a taken name.
    """
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise RequestError(
            f'"{path}" is a {type(module).__name__}, whose children are its contents; '
            f"name a module inside of it"
        )
    place = place_of(module)
    if place is None:
        place = Place()
        module.add_module(CHILD, place)
        module.register_forward_pre_hook(_before, with_kwargs=True)
        module.register_forward_hook(_after, with_kwargs=True)
    if name in place.adapters:
        raise RequestError(f'"{path}" has an adapter "{name}" already')
    place.adapters[name] = adapter.train(module.training)
    adapter.attached_(module)


def detach_(module: nn.Module, name: str) -> None:
    """Take an adapter away; with the last one go the hooks, and the module is as it was."""
    place = place_of(module)
    if place is None or name not in place.adapters:
        return
    adapter = place.adapters[name]
    del place.adapters[name]
    place.active = [n for n in place.active if n != name]
    place.merged = [n for n in place.merged if n != name]
    if isinstance(adapter, Adapter):
        adapter.removed_(module)
    if not len(place.adapters):
        del module._modules[CHILD]
        for hooks, flags, ours in (
            (module._forward_hooks, module._forward_hooks_with_kwargs, _after),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, _before),
        ):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                flags.pop(key, None)


def cast(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` in the type of the adapter's weights, unless autocast chooses the type anyway."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def _before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    place = place_of(module)
    if place is not None:
        for adapter in place.acting():
            args, kwargs = adapter.before(module, args, kwargs)
    return args, kwargs


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    place = place_of(module)
    if place is not None:
        for adapter in place.acting():
            output = adapter.after(module, args, kwargs, output)
    return output
