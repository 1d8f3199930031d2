"""One adapter on disk, as small as what it keeps: values, and the mask in coded form.

A directory as ``sparing.core.state`` writes it (safetensors and JSON, checksummed, replaced as a
whole). All values of one dtype are one tensor, and all masks one record of
``sparing.weights.stored``, since a file's header costs as much as a hundred values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparing.core import state
from sparing.core.errors import RequestError, RunError
from sparing.weights.adapter import Adapter, adapters, attach_, places
from sparing.weights.bottleneck import BOTTLENECKS
from sparing.weights.factor import Factor
from sparing.weights.fingerprint import fingerprint
from sparing.weights.installed import active, base_parameters, merged, parts, require
from sparing.weights.installing import installing
from sparing.weights.lora import LoRA
from sparing.weights.own import Own
from sparing.weights.prefix import Prefix
from sparing.weights.stored import decode, encode
from sparing.weights.switching import disabled

FORMAT = 1
WHAT = "sparing adapter"


def save_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write the adapter ``name`` to the directory ``path``, for ``load_adapter_``.

    All or nothing: an older one at ``path`` is replaced only by a complete new one. Raises
    RequestError for an unknown name or a ``path`` that holds something else, RunError if it could
    not be written.
    """
    path = Path(path)
    about = require(model, name)
    if path.is_file() or (
        path.is_dir() and any(path.iterdir()) and not (path / state.JSON).exists()
    ):
        raise RequestError(f"{path} holds something else; give a new directory")
    mine = parts(model, name)
    flags = [factor.mask().reshape(-1).cpu() for _, factor in _factors(mine)]
    values: dict[str, list[Tensor]] = {}
    listed: list[list[Any]] = []
    for tensor in _tensors(model, mine, name):
        dtype = str(tensor.dtype).removeprefix("torch.")
        values.setdefault(dtype, []).append(tensor.detach().cpu().reshape(-1))
        listed.append([dtype, tensor.numel()])
    tree = {
        "masks": encode(torch.cat(flags)),
        "values": {dtype: torch.cat(tensors) for dtype, tensors in values.items()},
    }
    meta = {
        "what": WHAT,
        "format": FORMAT,
        "options": about["options"],
        "heads": about["heads"],
        "fingerprint": about["fingerprint"],
        "parts": {place: describe(part) for place, part in mine.items()},
        "tensors": listed,
    }
    state.save(path, tree, meta=meta)


def load_adapter_(
    model: nn.Module, path: str | Path, name: str | None = None, *, any_base: bool = False
) -> nn.Module:
    """Put the adapter that ``save_adapter`` wrote on a model, in place; it acts from now on.

    name: another one than it had. any_base: do not ask whether it was trained on this base.
    Raises RequestError if there is no adapter at ``path`` or it belongs to another base; RunError
    if it is damaged or a newer version wrote it. The model is as before then.
    """
    tree, meta = state.read(Path(path))
    if not isinstance(meta, dict) or meta.get("what") != WHAT:
        raise RequestError(f"{path} holds no adapter; give a directory that save_adapter wrote")
    if meta["format"] > FORMAT:
        raise RunError(
            f"the adapter at {path} has format {meta['format']}, and this version reads up to "
            f'{FORMAT}; upgrade with "pip install --upgrade sparing"'
        )
    name = meta["options"]["name"] if name is None else name
    if merged(model):
        raise RequestError("adapters are merged into the base; unmerge_ them first")
    _require_fitting(model, meta, path, any_base)
    with installing(model, name, meta["options"], meta["heads"]):
        made = {}
        for place, about in meta["parts"].items():
            made[place] = restored(about)
            attach_(model.get_submodule(place), place, name, made[place])
        try:
            _fill_(model, made, name, tree, meta["tensors"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError(
                f"the adapter at {path} does not fit together ({error}); save it again"
            ) from error
    return model


def holds_adapter(path: Path) -> bool:
    """Whether ``save_adapter`` wrote what is at ``path``; it is not read any further."""
    try:
        meta = state.read(path).meta
    except RunError:
        return False
    return isinstance(meta, dict) and meta.get("what") == WHAT


def stored_bytes(model: nn.Module, name: str = "default") -> tuple[int, int]:
    """Bytes of an adapter's values and masks on disk, and of the same adapter without masks.

    Headers and descriptions, which do not grow with the values, are left out.
    """
    require(model, name)
    mine = parts(model, name)
    values = sum(t.numel() * t.element_size() for t in _tensors(model, mine, name))
    factors = [factor for _, factor in _factors(mine)]
    dropped = sum((f.size - f.kept) * f.values.element_size() for f in factors)
    masks = encode(torch.cat([factor.mask().reshape(-1).cpu() for factor in factors]))
    return values + masks.numel(), values + dropped


def describe(part: Adapter) -> dict[str, Any]:
    """What a file keeps of a part beside its values and masks."""
    return {
        "kind": part.kind,
        "config": part.config(),
        "factors": {name: list(factor.shape) for name, factor in part.named_factors()},
    }


def restored(about: Mapping[str, Any]) -> Adapter:
    """An empty part of the kind and sizes that ``describe`` noted, on the CPU in float32."""
    kind, config = about["kind"], about["config"]
    dense = {factor: torch.zeros(shape) for factor, shape in about["factors"].items()}
    if kind == LoRA.kind:
        return LoRA(dense["a"], dense["b"], **config)
    if kind == Prefix.kind:
        return Prefix(dense["key"], dense["value"], **config)
    if kind not in BOTTLENECKS:
        raise RunError(
            f'the file has a part of the kind "{kind}", which this version does not know'
        )
    biases = torch.zeros(dense["down"].shape[0]), torch.zeros(dense["up"].shape[0])
    return BOTTLENECKS[kind](dense["down"], dense["up"], *biases, **config)


def _require_fitting(model: nn.Module, meta: Mapping[str, Any], path: Any, any_base: bool) -> None:
    modules = dict(model.named_modules())
    wanted = [*meta["parts"], *meta["heads"]]
    missing = [place for place in wanted if place not in modules]
    if missing:
        raise RequestError(
            f'the adapter at {path} belongs to another base: this one has no module "{missing[0]}"'
            f" ({len(missing)} of {len(wanted)} are missing)"
        )
    if any_base:
        return
    acting = active(model)
    if acting:  # heads of other adapters stand in the base
        with disabled(model):
            found = fingerprint(base_parameters(model).items(), meta["heads"])
    else:
        found = fingerprint(base_parameters(model).items(), meta["heads"])
    if found != meta["fingerprint"]:
        raise RequestError(
            f"the adapter at {path} was trained on another base (fingerprint "
            f"{meta['fingerprint'][:12]}, this model has {found[:12]}); load the base that it was "
            f"trained on, or give any_base=True to put it on this one all the same"
        )


def _factors(mine: Mapping[str, Adapter]) -> list[tuple[str, Factor]]:
    return [
        (f"{path}.{name}", factor)
        for path, part in mine.items()
        for name, factor in part.named_factors()
    ]


def _tensors(model: nn.Module, mine: Mapping[str, Adapter], name: str) -> list[Tensor]:
    """All that is stored of an adapter, in a fixed order: values, biases, its parts of the base."""
    found: list[Tensor] = [factor.values for _, factor in _factors(mine)]
    for part in mine.values():
        found += [parameter for _, parameter in part.plain_parameters()]
    for path, part in adapters(model, name).items():
        if isinstance(part, Own):
            module, place = places(model)[path]
            found += part.values(module, name in place.active).values()
    return found


@torch.no_grad()
def _fill_(
    model: nn.Module,
    made: Mapping[str, Adapter],
    name: str,
    tree: Mapping[str, Any],
    listed: list[list[Any]],
) -> None:
    """Give parts their masks and values, and heads theirs; ValueError if sizes differ."""
    factors = _factors(made)
    total = sum(factor.size for _, factor in factors)
    flags = decode(tree["masks"], (total,))
    pieces = torch.split(flags, [factor.size for _, factor in factors])
    for (_, factor), flat in zip(factors, pieces, strict=True):
        if not bool(flat.all()):
            factor.keep_(flat.view(factor.shape))
    at = dict.fromkeys(tree["values"], 0)
    mine = {id(parameter) for part in made.values() for parameter in part.parameters()}
    for place, (dtype, count) in zip(_tensors(model, made, name), listed, strict=True):
        if place.numel() != count:
            raise ValueError(f"{count} values are for a place of {place.numel()}")
        value = tree["values"][dtype][at[dtype] : at[dtype] + count].view(place.shape)
        at[dtype] += count
        if id(place) in mine:  # has the type that it was trained in
            place.data = value.clone()
        else:
            place.copy_(value)
    for path, part in made.items():
        weight = next(model.get_submodule(path).parameters(recurse=False), None)
        part.to(next(model.parameters()).device if weight is None else weight.device)
