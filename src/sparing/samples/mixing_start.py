"""The weights that a mixture starts from, and reference losses: options put to the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparing.core.errors import RequestError, nearest
from sparing.samples.mixing_options import MixOptions
from sparing.samples.mixing_plan import Ids
from sparing.samples.mixing_weights import normalised, tempered


def by_name(options: MixOptions, option: str, names: Sequence[str]) -> Tensor | None:
    """The option ``weights`` or ``reference`` in the sources' order, (D,); None if not given.

    Raises RequestError for a source that the data does not have, for another number of values, and
    for a source without a reference.
    """
    given = getattr(options, option)
    if given is None:
        return None
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise RequestError(
                    f'{option} names a source "{name}" that the data does not have; '
                    f"{nearest(name, names)}"
                )
        if option == "reference" and len(given) < len(names):
            missing = [name for name in names if name not in given]
            raise RequestError(f"reference has no loss for the sources {', '.join(missing)}")
        given = [given.get(name, 0.0) for name in names]
    if len(given) != len(names):
        raise RequestError(
            f"{option} has {len(given)} values for the {len(names)} sources {', '.join(names)}"
        )
    return torch.tensor(given, dtype=torch.float64)


def first(options: MixOptions, names: Sequence[str], sizes: Ids) -> Tensor:
    """The first weights, (D,) float64; RequestError for weight on an empty source."""
    held = torch.from_numpy(sizes.copy())
    given = by_name(options, "weights", names)
    if options.rule in ("none", "size"):
        return normalised(held)
    heat = options.temperature
    if heat is not None and (options.rule == "temperature" or given is None):
        return tempered(held, heat)
    found = (held > 0).double() if given is None else given
    pairs = zip(names, found.tolist(), sizes, strict=True)
    empty = [name for name, weight, size in pairs if weight and not size]
    if empty:
        raise RequestError(
            f"the sources {', '.join(empty)} have weight and are empty; leave them out"
        )
    return normalised(found)
