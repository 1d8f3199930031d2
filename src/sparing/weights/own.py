"""A part of the base that an adapter trains too, such as a new head: each adapter has its own."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from sparing.weights.adapter import Adapter


@final
class Own(Adapter):
    """An adapter's own values of a module's parameters.

    While the adapter acts they stand in the module itself, under their usual names, and the base's
    wait here; otherwise the other way round. So one base with several adapters has, at any time,
    the head of the one that acts, and its own if none does.
    """

    kind: ClassVar[str] = "own"
    factors: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = [name for name, _ in module.named_parameters(recurse=False)]
        for name, parameter in module.named_parameters(recurse=False):
            self.register_buffer(name, parameter.detach().clone())

    def config(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def swap_(self, module: nn.Module) -> None:
        """Exchange the module's values for those that wait."""
        for name in self.names:
            parameter, waiting = getattr(module, name), getattr(self, name)
            setattr(self, name, parameter.data)
            parameter.data = waiting.to(parameter)
            parameter.grad = None

    def values(self, module: nn.Module, acting: bool) -> dict[str, Tensor]:
        """This adapter's values, wherever they stand now."""
        return {
            name: (getattr(module, name) if acting else getattr(self, name)).detach()
            for name in self.names
        }

    @torch.no_grad()
    def put_(self, module: nn.Module, acting: bool, values: dict[str, Tensor]) -> None:
        """Replace this adapter's values, wherever they stand now."""
        for name, place in self.values(module, acting).items():
            place.copy_(values[name])
