"""How many entries of each tensor to keep: Erdos-Renyi densities, exact to the entry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

from sparing.core.errors import RequestError
from sparing.core.select import allocate, rounded
from sparing.weights.masks import require_share


def erdos_renyi(
    shapes: Mapping[str, Sequence[int]], keep: float, *, kernel: bool = False
) -> dict[str, int]:
    """Kept entries of each tensor by name; together exactly ``round(keep * N)`` of all N.

    shapes: (out, in, *kernel) of each tensor. The density of a tensor is a common multiplier
    times (in + out) / (in * out); with ``kernel`` times (in + out + sum of kernel sides) / (in *
    out * product of kernel sides). A tensor that this would make denser than dense is kept
    whole, and the multiplier is solved for again among the others (Mocanu et al. 2018; with
    kernels Evci et al. 2020). In whole numbers and fractions; what rounding leaves goes to the
    largest remainders. Raises RequestError for keep outside (0, 1] and for shapes of one axis.
    """
    require_share(keep)
    if not shapes:
        raise RequestError("there are no shapes to share entries among; name at least one tensor")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    # a tensor's expected entries are the multiplier times this whole number
    parts = {name: _part(name, shape, kernel) for name, shape in shapes.items()}
    left = rounded(keep, sum(sizes.values()))
    counts: dict[str, int] = {name: 0 for name in shapes}
    free = [name for name in shapes if sizes[name] > 0]
    while free:
        multiplier = Fraction(left, sum(parts[name] for name in free))
        full = [name for name in free if multiplier * parts[name] >= sizes[name]]
        if not full:
            break
        for name in full:
            counts[name] = sizes[name]
            left -= sizes[name]
        free = [name for name in free if name not in set(full)]
    if free:
        given = allocate(left, torch.tensor([parts[name] for name in free]))
        counts |= dict(zip(free, given.tolist(), strict=True))
    return counts


def _part(name: str, shape: Sequence[int], kernel: bool) -> int:
    if len(shape) < 2:
        raise RequestError(
            f'"{name}" has shape {tuple(shape)}; Erdos-Renyi densities are of weights with an '
            f"output and an input axis, leave vectors out"
        )
    ends, sides = shape[0] + shape[1], list(shape[2:])
    return ends + sum(sides) if kernel else ends * math.prod(sides)
