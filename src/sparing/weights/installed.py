"""What a model knows of the adapters that it has: plain data beside its modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparing.core.errors import RequestError, nearest
from sparing.weights.adapter import Adapter, adapters, places
from sparing.weights.own import Own

NOTE = "sparing_adapted"


def note_of(model: nn.Module) -> dict[str, Any]:
    """``{"trainable": names, "adapters": {name: {...}}}``, empty for a model without adapters.

    ``trainable`` are the base's parameters that were trained before the first adapter came.
    """
    found: dict[str, Any] = vars(model).get(NOTE, {"trainable": [], "adapters": {}})
    return found


def names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order in which they came."""
    return list(note_of(model)["adapters"])


def require(model: nn.Module, name: str) -> dict[str, Any]:
    """What is known of an adapter. Raises RequestError if the model has none of that name."""
    known = note_of(model)["adapters"]
    if name not in known:
        if not known and places(model):
            raise RequestError("this is a part of an adapted model; give the model itself")
        raise RequestError(f'the model has no adapter "{name}"; {nearest(name, known)}')
    found: dict[str, Any] = known[name]
    return found


def parts(model: nn.Module, name: str) -> dict[str, Adapter]:
    """The parts of an adapter that have a delta of their own, by the module that each adapts."""
    return {path: part for path, part in adapters(model, name).items() if not isinstance(part, Own)}


def active(model: nn.Module) -> list[str]:
    """The names of the adapters that act, in order."""
    found: list[str] = []
    for _, place in places(model).values():
        found += [name for name in place.active if name not in found]
    return [name for name in names(model) if name in found]


def merged(model: nn.Module) -> bool:
    """Whether adapters are merged into the base's weights."""
    return any(place.merged for _, place in places(model).values())


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not an adapter's, by name."""
    owned = {id(p) for _, place in places(model).values() for p in place.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in owned}


def trained(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """What an adapter trains while it acts: values, biases, and its own parts of the base."""
    found: dict[str, nn.Parameter] = {}
    for path, (module, place) in places(model).items():
        part = dict(place.adapters.items()).get(name)
        if isinstance(part, Own):
            found |= {
                f"{path}.{own}": parameter
                for own, parameter in module.named_parameters(recurse=False)
            }
        elif part is not None:
            found |= {f"{path}.{own}": p for own, p in part.named_parameters()}
    return found
