"""The parts of an adapter, made for a model: which kind of part stands at which module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import nn

from sparing.core.errors import RequestError
from sparing.core.select import rounded
from sparing.weights.adapter import Adapter
from sparing.weights.bottleneck import BOTTLENECKS
from sparing.weights.lora import LoRA, sizes
from sparing.weights.options import Options
from sparing.weights.places import (
    KINDS,
    Spot,
    attention_layers,
    bottleneck_spots,
    lora_targets,
    matching,
)
from sparing.weights.prefix import Prefix
from sparing.weights.prefix import sizes as prefix_sizes

REDUCTION: Final = {"parallel": 2, "mam": 2}
"""Bottlenecks of adapter-hub are 16 times narrower than their input, parallel ones 2 times."""


def spots(model: nn.Module, options: Options) -> list[Spot]:
    """Where the adapter's parts go, in the order of the model's modules.

    Raises RequestError if there is no place, or if ``exclude`` leaves none.
    """
    found: list[Spot] = []
    if "lora" in KINDS[options.kind]:
        for path in lora_targets(model, options.targets):
            dims = sizes(model.get_submodule(path))
            assert dims is not None
            found.append(Spot(path, "lora", dims))
    if "prefix" in KINDS[options.kind]:
        # targets of Mix-and-Match are those of its bottlenecks
        targets = options.targets if options.kind == "prefix" else None
        for path in attention_layers(model, targets):
            found.append(Spot(path, "prefix", prefix_sizes(model.get_submodule(path))))
    if "bottleneck" in KINDS[options.kind]:
        found += bottleneck_spots(model, options.kind, options.targets)
    if options.exclude:
        left_out = set(matching(options.exclude, [spot.path for spot in found], "places"))
        found = [spot for spot in found if spot.path not in left_out]
        if not found:
            raise RequestError(f"exclude={options.exclude!r} leaves no place to adapt")
    return found


def parts(model: nn.Module, options: Options, where: list[Spot], seed: int) -> dict[str, Adapter]:
    """New parts by the name of the module that each adapts, dense, with their first values."""
    generator = torch.Generator().manual_seed(seed)
    size = _sized(options, where)
    made: dict[str, Adapter] = {}
    for spot in where:
        module = model.get_submodule(spot.path)
        weight = next(module.parameters(), None)
        weight = next(model.parameters()) if weight is None else weight
        dtype = adapter_dtype(options, weight.dtype)
        if spot.kind == "lora":
            made[spot.path] = LoRA.fresh(
                module,
                rank=size(spot),
                # a budget changes the rank, not the scale at which LoRA learns
                alpha=options.alpha * size(spot) / options.rank,
                dropout=options.dropout,
                zero_start=options.zero_start,
                dtype=dtype,
                generator=generator,
            )
        elif spot.kind == "prefix":
            made[spot.path] = Prefix.fresh(
                module,
                length=size(spot),
                zero_start=options.zero_start,
                dtype=dtype,
                generator=generator,
            )
        else:
            beside = spot.kind.startswith("parallel")
            made[spot.path] = BOTTLENECKS[spot.kind].fresh(
                spot.sizes,
                width=size(spot),
                activation=options.activation or ("swish" if options.kind == "houlsby" else "relu"),
                scale=options.scale if options.scale is not None else 4.0 if beside else 1.0,
                dropout=options.dropout,
                zero_start=options.zero_start,
                dtype=dtype,
                device=weight.device,
                generator=generator,
            )
    return made


def adapter_dtype(options: Options, base: torch.dtype) -> torch.dtype:
    """Half precision loses small updates, so that an adapter of such a base is in float32."""
    if options.dtype is not None:
        found = getattr(torch, options.dtype)
        assert isinstance(found, torch.dtype)
        return found
    return torch.float32 if base in (torch.float16, torch.bfloat16) else base


def _sized(options: Options, where: list[Spot]) -> Callable[[Spot], int]:
    """Rank, width or length at a spot: what the options say, or what the budget pays for."""

    def usual(spot: Spot) -> int:
        if spot.kind == "lora":
            return options.rank
        if spot.kind == "prefix":
            return options.length
        return options.width or max(1, spot.sizes[0] // REDUCTION.get(options.kind, 16))

    if options.budget is None:
        return usual
    kinds = {spot.kind == "prefix" for spot in where}
    # Mix-and-Match splits its budget evenly over prefixes and bottlenecks
    share = {kind: options.budget / len(kinds) for kind in kinds}
    width = {
        kind: _widest([s for s in where if (s.kind == "prefix") == kind], share[kind], options)
        for kind in kinds
    }
    return lambda spot: width[spot.kind == "prefix"]


def _widest(where: list[Spot], budget: float, options: Options) -> int:
    """The largest size that the budget pays for at the share ``keep``."""
    fixed = sum(unmasked(spot, 0) for spot in where)
    each = sum(entries(spot, 1) for spot in where)
    biases = sum(unmasked(spot, 1) for spot in where) - fixed
    width = math.floor((budget - fixed) / (options.keep * each + biases))
    if width < 1:
        least = math.ceil(fixed + options.keep * each + biases)
        raise RequestError(
            f"a budget of {options.budget} values does not pay for one unit at each of the "
            f"{len(where)} places at keep={options.keep}; give at least {least}, or fewer targets"
        )
    return width


def entries(spot: Spot, size: int) -> int:
    """Matrix entries of a part of that rank, width or length."""
    return 2 * size * spot.sizes[0] if spot.kind == "prefix" else size * sum(spot.sizes)


def unmasked(spot: Spot, size: int) -> int:
    """Biases of such a part, which are all kept."""
    return 0 if spot.kind in ("lora", "prefix") else size + spot.sizes[1]


def kept_of_budget(options: Options, total: int, biases: int) -> float:
    """The share to keep of ``total`` entries: ``keep``, or what the budget leaves after biases."""
    if options.budget is None or options.pattern != "entry":
        return options.keep
    share = min(1.0, (options.budget - biases) / total)
    assert rounded(share, total) <= options.budget
    return share
