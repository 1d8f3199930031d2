"""Exact masks from scores: asked to keep a share of N, it is round(share * N), ties or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown
from sparing.core.select import choose_mask, rounded
from sparing.weights.patterns import Pattern, Piece, Units

SCOPES = ("global", "layer", "tensor")
Layers = Callable[[str], str] | Mapping[str, str]


def masks(
    scores: Mapping[str, Tensor],
    keep: float | Mapping[str, int],
    *,
    scope: str = "global",
    pattern: str = "entry",
    layer_of: Layers | None = None,
    units: Units | None = None,
    within: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Keep the entries with the highest scores: masks (bool) of the scores' shapes and devices.

    keep: the share kept, in (0, 1]; ``round(keep * N)`` of the N choices of each scope are kept.
    Or a count for each tensor (see ``sparing.weights.density``), whatever the scope.
    scope: whether N are all choices ("global"), those of one layer ("layer", as ``layer_of``
    says from a tensor's name), or of one tensor ("tensor").
    pattern: what a choice is. "entry"; "block:RxC", a block of a matrix; "unit", a slice on
    axis 0, or on the axis that ``units`` names, chosen for all tensors of its group together;
    "N:M" keeps N of every M along the last axis, so ``keep`` must be N / M and scope is moot.
    A choice's score is the sum of its entries' scores.
    within: masks of which the result is a part: what they leave out never comes back.
    generator: breaks ties (on the CPU); without one they go to the lowest index, in the order
    of ``scores``.

    Raises RequestError for scores that are not finite, naming the tensor, and for requests that
    cannot be met.
    """
    if not scores:
        raise RequestError("there are no scores to choose by; name at least one tensor")
    parsed = Pattern.parse(pattern)
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if not isinstance(keep, Mapping):
        require_share(keep)
    require_finite(scores)
    wide = {name: _wide(score) for name, score in scores.items()}
    if within is not None:
        wide = _within(wide, within)
    shapes = {name: score.shape for name, score in scores.items()}
    if parsed.kind == "n:m":
        _require_n_of_m(parsed, keep)
        if generator is not None:
            wide = {name: _shuffled_ranks(score, generator) for name, score in wide.items()}
        found = {name: parsed.n_of_m(name, score) for name, score in wide.items()}
    else:
        found = {}
        for pieces, count in _budgets(parsed.pieces(wide, units), keep, scope, layer_of):
            for piece, chosen in _chosen(pieces, count, generator):
                found |= parsed.spread(piece, chosen, shapes, units)
    made = {name: found[name].to(score.device) for name, score in scores.items()}
    if within is not None:
        _require_within(made, within)
    return made


def require_share(keep: float) -> None:
    """Raise RequestError unless ``keep`` is a number in (0, 1]."""
    require_number("keep", keep)
    if not 0 < keep <= 1:
        raise RequestError(
            f"keep must be in (0, 1], got {keep}; it is the share that is kept, 1 keeps all"
        )


def require_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise RequestError if a score is NaN or infinite, naming the first such tensor."""
    for name, score in scores.items():
        if not score.numel():
            continue
        # one pass without a tensor of flags: NaN and both infinities show in the extremes
        if not all(math.isfinite(float(end)) for end in score.detach().aminmax()):
            fine = score.isfinite()
            first = int((~fine).reshape(-1).nonzero()[0])
            raise RequestError(
                f'{int((~fine).sum())} of {score.numel()} scores of "{name}" are not finite, the '
                f"first at flat index {first} ({float(score.reshape(-1)[first])}); find out where "
                f"they come from: a diverged model, or data with NaN"
            )


def shares(keep: float, steps: int, *, schedule: str = "exponential") -> list[float]:
    """The share kept after each step from dense to ``keep``: falling, the last is ``keep``.

    "exponential" drops the same share of what is left at each step (keep^(t / steps)), "linear"
    the same number. Raises RequestError for a bad number or an unknown schedule.
    """
    require_share(keep)
    require_whole("steps", steps, 1)
    if schedule == "exponential":
        found = [keep ** (step / steps) for step in range(1, steps + 1)]
    elif schedule == "linear":
        found = [1 - (1 - keep) * step / steps for step in range(1, steps + 1)]
    else:
        raise unknown("schedule", schedule, ("exponential", "linear"))
    return [*found[:-1], keep]


def nested(
    score: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    dense: Mapping[str, Tensor],
    keeps: Iterable[float],
    *,
    scope: str = "global",
    pattern: str = "entry",
    layer_of: Layers | None = None,
    units: Units | None = None,
    generator: torch.Generator | None = None,
) -> list[dict[str, Tensor]]:
    """Masks of falling shares, each a part of the one before: what was dropped never comes back.

    score: gives the scores once the entries outside the masks are gone. dense: tensors of the
    shapes and devices of the scores, whose values are not read. keeps: as from ``shares``; each
    count is exact at its step. Raises what ``masks`` raises.
    """
    current = {
        name: torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
        for name, tensor in dense.items()
    }
    steps = []
    for keep in keeps:
        current = masks(
            score(current),
            keep,
            scope=scope,
            pattern=pattern,
            layer_of=layer_of,
            units=units,
            within=current,
            generator=generator,
        )
        steps.append(current)
    return steps


def _wide(score: Tensor) -> Tensor:
    """The same numbers in a type that represents them all and that can be minus infinity."""
    if score.dtype in (torch.float32, torch.float64):
        return score.detach()
    return score.detach().to(torch.float32 if score.is_floating_point() else torch.float64)


def _within(scores: dict[str, Tensor], within: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, score in scores.items():
        if name not in within or within[name].shape != score.shape:
            raise RequestError(f'within has no mask of the shape {tuple(score.shape)} of "{name}"')
    return {
        name: score.masked_fill(~within[name].to(score.device), -math.inf)
        for name, score in scores.items()
    }


def _require_within(made: dict[str, Tensor], within: Mapping[str, Tensor]) -> None:
    for name, mask in made.items():
        if bool((mask & ~within[name].to(mask.device)).any()):
            raise RequestError(
                f'"{name}" has too few choices left within the given masks; a later share must '
                f"not be above an earlier one, under the same scope and pattern"
            )


def _require_n_of_m(pattern: Pattern, keep: float | Mapping[str, int]) -> None:
    share = pattern.first / pattern.second
    if isinstance(keep, Mapping) or not math.isclose(keep, share, rel_tol=1e-9):
        raise RequestError(
            f"the pattern {pattern.first}:{pattern.second} keeps {share:g} of all entries; "
            f"set keep={share:g} or choose another pattern"
        )


def _budgets(
    pieces: list[Piece], keep: float | Mapping[str, int], scope: str, layer_of: Layers | None
) -> list[tuple[list[Piece], int]]:
    """Pieces that share a budget, and the number of choices that they keep."""
    if isinstance(keep, Mapping):
        return [([piece], _count(piece, keep)) for piece in pieces]
    if scope == "global":
        together = [pieces]
    elif scope == "tensor":
        together = [[piece] for piece in pieces]
    else:
        by_layer: dict[str, list[Piece]] = {}
        for piece in pieces:
            by_layer.setdefault(_layer(piece, layer_of), []).append(piece)
        together = list(by_layer.values())
    return [(part, rounded(keep, sum(piece.scores.numel() for piece in part))) for part in together]


def _count(piece: Piece, counts: Mapping[str, int]) -> int:
    name = piece.names[0]
    total = piece.scores.numel()
    if len(piece.names) > 1 or name not in counts:
        raise RequestError(f"keep gives no count for {', '.join(piece.names)}")
    if not 0 <= counts[name] <= total:
        raise RequestError(f'cannot keep {counts[name]} of the {total} choices of "{name}"')
    return counts[name]


def _layer(piece: Piece, layer_of: Layers | None) -> str:
    if layer_of is None:
        raise RequestError('scope="layer" needs layer_of: the layer of each tensor by its name')
    found = {layer_of[n] if isinstance(layer_of, Mapping) else layer_of(n) for n in piece.names}
    if len(found) > 1:
        raise RequestError(f"{', '.join(piece.names)} share units but lie in layers {found}")
    return found.pop()


def _chosen(
    pieces: list[Piece], count: int, generator: torch.Generator | None
) -> list[tuple[Piece, Tensor]]:
    device = pieces[0].scores.device
    pooled = torch.cat([piece.scores.to(device) for piece in pieces])
    mask = choose_mask(pooled, count, generator=generator)
    parts = torch.split(mask, [piece.scores.numel() for piece in pieces])
    return list(zip(pieces, parts, strict=True))


def _shuffled_ranks(score: Tensor, generator: torch.Generator) -> Tensor:
    """Ranks by score, ties in an order drawn from the generator: all different."""
    flat = score.reshape(-1)
    order = torch.randperm(flat.numel(), generator=generator).to(flat.device)
    order = order[flat[order].argsort(stable=True)]
    ranks = torch.empty(flat.shape, dtype=torch.float64, device=flat.device)
    ranks[order] = torch.arange(flat.numel(), dtype=torch.float64, device=flat.device)
    return ranks.reshape(score.shape)
