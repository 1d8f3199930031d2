"""Stacked weights: K versions of a weight, or K slots of experts, on axis 0 of one parameter.

Expert layers choose among the slots; dynamic convolutions mix them. Both, and whoever needs to
know which axis of a parameter is the slot, meet in this protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from sparing.core.errors import RequestError


@runtime_checkable
class Stacked(Protocol):
    """A module that has parameters with a slot axis."""

    def slots(self) -> dict[str, nn.Parameter]:
        """Its parameters of shape (K, ...) by their own name, K the same for all."""
        ...


def mix(weights: Mapping[str, Tensor], share: Tensor) -> dict[str, Tensor]:
    """Mix named weights (K, ...) over axis 0.

    share: (K,) gives each as (...); share: (B, K), one mixture a sample, gives (B, ...).
    Differentiable in both. Raises RequestError if a K differs.
    """
    if share.ndim not in (1, 2):
        raise RequestError(f"share must be (K,) or (B, K), got shape {tuple(share.shape)}")
    slots = share.shape[-1]
    mixed = {}
    for name, weight in weights.items():
        if weight.ndim == 0 or weight.shape[0] != slots:
            raise RequestError(
                f'"{name}" has shape {tuple(weight.shape)}, but the share mixes {slots} slots'
            )
        flat = share.to(weight.dtype) @ weight.reshape(slots, -1)
        mixed[name] = flat.reshape((*share.shape[:-1], *weight.shape[1:]))
    return mixed


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters inside ``module`` that declare a slot axis, by the name they have in it.

    Raises RequestError if the slots of one module differ in number.
    """
    found: dict[str, nn.Parameter] = {}
    for prefix, part in module.named_modules():
        if not isinstance(part, Stacked):
            continue
        slots = part.slots()
        if len({parameter.shape[:1] for parameter in slots.values()}) > 1:
            shapes = {name: tuple(parameter.shape) for name, parameter in slots.items()}
            raise RequestError(f'"{prefix}" declares slots of different numbers: {shapes}')
        for name, parameter in slots.items():
            found[f"{prefix}.{name}" if prefix else name] = parameter
    return found
