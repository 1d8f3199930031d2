"""Several adapters on one base: which of them act, and what happens to the base's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError, RunError
from sparing.weights.adapter import Adapter, Place, detach_, places
from sparing.weights.installed import (
    NOTE,
    active,
    base_parameters,
    merged,
    names,
    note_of,
    parts,
    require,
    trained,
)
from sparing.weights.own import Own


def switch_(model: nn.Module, *wanted: str) -> nn.Module:
    """Let the adapters of these names act and be trained, all others neither; none: the base.

    Several act together: their changes add up, bottlenecks one after the other; at most one of
    them may bring its own head. What was merged is unmerged first. Raises RequestError for an
    unknown name.
    """
    for name in wanted:
        require(model, name)
    if len(set(wanted)) < len(wanted):
        raise RequestError(f"an adapter is named twice: {', '.join(wanted)}")
    owners = [name for name in wanted if require(model, name)["heads"]]
    if len(owners) > 1:
        raise RequestError(
            f"{' and '.join(owners)} each bring their own {require(model, owners[0])['heads']}; "
            f"only one of them can act at a time"
        )
    unmerge_(model)
    for module, place in places(model).values():
        before, now = place.active, [name for name in wanted if name in place.adapters]
        for gone in (True, False):  # the base's values come back before others go in
            for name, part in place.adapters.items():
                left, came = name in before and name not in now, name in now and name not in before
                if isinstance(part, Own) and (left if gone else came):
                    part.swap_(module)
        place.active = now
    _let_train_(model, wanted)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone, with its own head and weights; afterwards the same adapters act again."""
    before, were_merged = active(model), merged(model)
    switch_(model)
    try:
        yield
    finally:
        switch_(model, *before)
        if were_merged:
            merge_(model)


@torch.no_grad()
def merge_(model: nn.Module, *, unload: bool = False) -> nn.Module:
    """Add what acts into the base's weights, so that it costs nothing more.

    The products are added in float32 or wider. The weights from before are kept for ``unmerge_``,
    which gives them back bit for bit; with ``unload`` they and all adapters go, and a plain model
    of the base's class stays. Raises RequestError for kinds that cannot be merged, if nothing acts,
    and for a weight that two modules share; RunError if a merged weight would not be finite.
    Nothing is changed then.
    """
    acting = active(model)
    if not acting:
        raise RequestError("no adapter acts, so that there is nothing to merge; switch_ to one")
    if not merged(model):
        found: list[tuple[nn.Module, Place, Tensor]] = []
        shared = _shared(model)
        for path, (module, place) in places(model).items():
            todo = [part for part in place.acting() if not isinstance(part, Own)]
            if not todo:
                continue
            for part in todo:
                if not part.mergeable:
                    raise RequestError(
                        f'adapters of kind "{part.kind}" (at "{path}") cannot be merged: what '
                        f"they add is no linear function of what the module takes; keep the model "
                        f"as it is, or train a LoRA"
                    )
            found.append((module, place, _sum(path, module, todo, shared)))
        for module, place, weight in found:
            own = _weight(module)
            place.original = own.detach().clone()
            own.copy_(weight)
            place.merged = list(place.active)
    if unload:
        for module, place in places(model).values():
            for name in list(place.adapters):
                detach_(module, name)
        _free_(model)
    return model


@torch.no_grad()
def unmerge_(model: nn.Module) -> nn.Module:
    """Give the base its weights back as they were before ``merge_``, bit for bit."""
    for module, place in places(model).values():
        if place.merged and place.original is not None:
            _weight(module).copy_(place.original)
        place.original = None
        place.merged = []
    return model


def delete_(model: nn.Module, name: str) -> nn.Module:
    """Take an adapter away. With the last one, the base is as it was before the first.

    Raises RequestError for an unknown name.
    """
    require(model, name)
    switch_(model, *(other for other in active(model) if other != name))
    for module, _ in places(model).values():
        detach_(module, name)
    del note_of(model)["adapters"][name]
    for other in names(model):
        # attention layers share one configuration: a prefix that stays needs it still
        for path, part in parts(model, other).items():
            part.attached_(model.get_submodule(path))
    if not names(model):
        _free_(model)
    return model


def _sum(path: str, module: nn.Module, todo: list[Adapter], shared: set[int]) -> Tensor:
    weight = _weight(module)
    if id(weight) in shared:
        raise RequestError(
            f'the weight of "{path}" is tied to another module, which a merge would change too; '
            f"leave it out of the targets, or untie it"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    for part in todo:
        total = total + part.delta(module).to(wide)
    result = total.to(weight.dtype)
    if not bool(torch.isfinite(result).all()):
        raise RunError(f'merging would make the weight of "{path}" infinite or NaN')
    return result


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _shared(model: nn.Module) -> set[int]:
    """Parameters that stand in more than one module."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _let_train_(model: nn.Module, wanted: tuple[str, ...]) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in wanted:
        for parameter in trained(model, name).values():
            parameter.requires_grad_(True)


def _free_(model: nn.Module) -> None:
    """Without adapters, the base trains again what it trained before they came."""
    before = set(note_of(model)["trainable"])
    for name, parameter in base_parameters(model).items():
        parameter.requires_grad_(name in before)
    vars(model).pop(NOTE, None)
