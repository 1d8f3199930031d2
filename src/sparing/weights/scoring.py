"""From a dense adapter in its place to the masks of what stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.errors import RequestError, RunError
from sparing.core.random_state import random_state, set_random_state_
from sparing.weights import scores
from sparing.weights.adapter import Adapter
from sparing.weights.build import kept_of_budget
from sparing.weights.density import erdos_renyi
from sparing.weights.masks import masks
from sparing.weights.options import DATA_FREE, Options
from sparing.weights.scores.batches import changed, one, tensors

Loss = Callable[[nn.Module, Any], Tensor]


def choose(
    model: nn.Module,
    parts: Mapping[str, Adapter],
    options: Options,
    data: Iterable[Any] | None,
    loss: Loss | None,
    seed: int,
) -> dict[str, Tensor]:
    """The masks (bool) of all factors, by ``module.factor``, exact in number.

    Raises RequestError if the score needs data and there is none, or it has no labels; RunError or
    RequestError naming the factor if scores are not finite.
    """
    named = {
        f"{path}.{name}": factor.values
        for path, part in parts.items()
        for name, factor in part.named_factors()
    }
    total = sum(values.numel() for values in named.values())
    biases = sum(p.numel() for part in parts.values() for _, p in part.plain_parameters())
    keep = kept_of_budget(options, total, biases)
    if keep == 1 and ":" not in options.pattern:  # nothing to choose: no data is asked for
        return {name: torch.ones_like(v, dtype=torch.bool) for name, v in named.items()}
    layer_of = {name: name.rpartition(".")[0] for name in named}
    units = {
        f"{path}.{factor}": (f"{path}:{group}", axis)
        for path, part in parts.items()
        for group, members in enumerate(part.units)
        for factor, axis in members
    }
    arguments: dict[str, Any] = {
        "scope": options.scope,
        "pattern": options.pattern,
        "layer_of": layer_of,
        "units": units,
    }
    found = _scores(model, named, options, data, loss, seed, keep, arguments)
    if options.score in ("er", "erk"):
        shapes = {name: tuple(values.shape) for name, values in named.items()}
        counts = erdos_renyi(shapes, keep, kernel=options.score == "erk")
        return masks(found, counts)
    return masks(found, keep, **arguments)


def _scores(
    model: nn.Module,
    named: dict[str, nn.Parameter],
    options: Options,
    data: Iterable[Any] | None,
    loss: Loss | None,
    seed: int,
    keep: float,
    arguments: dict[str, Any],
) -> dict[str, Tensor]:
    if options.score in ("random", "er", "erk"):
        return scores.random(model, named, seed=seed)
    if options.score == "magnitude":
        return scores.magnitude(model, named, seed=seed)
    if options.score == "synflow":
        shapes = () if data is None else [one(b) for b in drawn(model, data, 1, options.score)]
        return scores.synflow(model, named, shapes, loss or _called, keep=keep, **arguments)
    batches = drawn(model, data, options.batches, options.score)
    loss = loss or own_loss
    if options.score == "iterative-snip":
        found = scores.iterative_snip(
            model, named, batches, loss, keep=keep, steps=options.iterations, **arguments
        )
    elif options.score == "snip":
        found = scores.snip(model, named, batches, loss)
    elif options.score == "grasp":
        found = scores.grasp(model, named, batches, loss)
    else:
        found = scores.fisher(model, named, batches, loss)
    return found


def drawn(model: nn.Module, data: Iterable[Any] | None, count: int, score: str) -> list[Any]:
    """The first batches of the data, on the model's device; generators stay as they were.

    Raises RequestError without data or with data that has no batch.
    """
    if data is None:
        raise RequestError(
            f'the score "{score}" looks at the loss of some batches, and no data was given; give '
            f"adapt_(model, method, data=loader), losses= to a session, or method.on(loader); or "
            f"choose one that needs no data: {', '.join(DATA_FREE)}"
        )
    if isinstance(data, Sized) and len(data) == 0:
        raise RequestError(f'the data for the score "{score}" is empty; give at least one batch')
    kept = random_state()
    owners = (data, getattr(data, "sampler", None))
    generators = [
        g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]
    try:
        found = list(itertools.islice(iter(data), count))
    finally:
        set_random_state_(kept)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
    if not found:
        raise RequestError(f'the data for the score "{score}" is empty; give at least one batch')
    device = next(model.parameters()).device
    return [changed(batch, lambda t: t.to(device)) for batch in found]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch where none was given: the model's own, or cross-entropy on (x, y).

    Raises RequestError for a batch without labels.
    """
    if isinstance(batch, Mapping):
        labelled = any(name in batch for name in ("labels", "start_positions", "label"))
        if not labelled:
            raise RequestError(
                f"the batches have no labels (their keys are {', '.join(map(str, batch))}); add "
                f'"labels", give loss=..., or choose a score that needs no data'
            )
        batch = dict(batch)
        if "label" in batch and "labels" not in batch:
            batch["labels"] = batch.pop("label")
        found = getattr(model(**batch), "loss", None)
        if not isinstance(found, Tensor):
            raise RequestError(
                f"{type(model).__name__} gave no loss for its labels; give loss=(model, batch) -> "
                f"a number"
            )
        return found
    if isinstance(batch, list | tuple) and len(batch) == 2:
        x, y = batch
        output = model(x)
        output = getattr(output, "logits", output)
        if isinstance(y, Tensor) and y.dtype == torch.int64:
            return F.cross_entropy(output.flatten(0, -2), y.flatten())
    kinds = [f"{t.dtype} {tuple(t.shape)}" for t in tensors(batch)][:4]
    raise RequestError(
        f"a batch for a score is a mapping with labels or a pair (x, y) with classes y in int64, "
        f"got {type(batch).__name__} of {', '.join(kinds) or 'no tensors'}; give "
        f"loss=(model, batch) -> a number"
    )


def _called(model: nn.Module, batch: Any) -> Any:
    """Calls the model on a batch, labels or not; what it gives is not looked at."""
    if isinstance(batch, Mapping):
        return model(**{k: v for k, v in batch.items() if k not in ("label", "labels")})
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


@torch.no_grad()
def compact_(parts: Mapping[str, Adapter], found: Mapping[str, Tensor], pattern: str) -> None:
    """Leave of each factor what its mask keeps; of whole units, a smaller dense matrix."""
    for path, part in parts.items():
        if pattern == "unit":
            for group, members in enumerate(part.units):
                first, axis = members[0]
                units = found[f"{path}.{first}"].any(1 - axis).nonzero().squeeze(1)
                for name, along in members:
                    getattr(part, name).keep_units_(units, along)
                part.shrunk_(group, units)
            continue
        for name, factor in part.named_factors():
            mask = found[f"{path}.{name}"]
            if not bool(mask.all()):
                factor.keep_(mask)


def require_finite(parts: Mapping[str, Adapter]) -> None:
    """Raise RunError if a value of an adapter is not finite, naming where it stands."""
    for path, part in parts.items():
        for name, parameter in part.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise RunError(f'"{name}" of the adapter at "{path}" is not finite')
