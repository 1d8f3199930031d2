"""Settings that runs decide, once: matched widths, random arms, precision. Kept in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from sparing.core.errors import RequestError
from sparing.core.state import atomic_write_json
from sparing.run.compare.arms import Asked, Planned, generated
from sparing.run.compare.found import Found, read_json
from sparing.run.declared import Match
from sparing.run.plan import plan
from sparing.run.recipe import Recipe

FILE = "settled.json"
NEAR = 0.05
"""A cost further than this share from the one to match is refused."""


def read(directory: Path) -> dict[str, Any]:
    """What was settled in earlier calls, {} at first."""
    file = directory / FILE
    return read_json(file) if file.is_file() else {}


def write(directory: Path, settled: Mapping[str, Any]) -> None:
    """Keep what was settled."""
    atomic_write_json(directory / FILE, {"format": 1, **settled})


def settle(
    planned: Planned, asked: Asked, source: Recipe, runs: Sequence[Found], fixed: Sequence[str]
) -> dict[str, Any]:
    """The keys and values of an arm that spends what the finished ``runs`` of another did.

    ``fixed``: overrides that all arms share. Returns {"set": {key: value}} with, where a key was
    solved, "match" {key, unit, target, planned, seeds}.

    Raises:
        RequestError: no value of the key comes near that cost.
    """
    settings: dict[str, Any] = {}
    match = planned.arm.match
    if planned.of is not None:
        made = generated(planned, _mean_signals(runs), source)
        settings, match = dict(made.arm.set), made.arm.match
    found: dict[str, Any] = {"set": settings}
    if match is None:
        return found
    target = _spent(runs, match.unit)
    whole = dataclasses.replace(planned, settled=settings).overrides()

    def load(value: Any = None) -> Recipe:
        more = [] if value is None else [f"{match.key}={value}"]
        return asked.load([*whole, *fixed, *more])

    start = _at(load().to_dict(), match)
    value, cost = solve(lambda v: _cost(plan(load(v)), match.unit), target, start)
    if not abs(cost / target - 1) <= NEAR:
        raise RequestError(
            f'the arm "{planned.name}" cannot be matched: {match.key} = {value:g} plans '
            f"{cost:.4g} {match.unit}, and {match.to} spent {target:.4g}"
        )
    settings[match.key] = value
    about = {"key": match.key, "to": match.to, "unit": match.unit}
    seeds = [run.seed for run in runs]
    found["match"] = {**about, "target": target, "planned": cost, "seeds": seeds}
    return found


def solve(
    cost: Callable[[Any], float], target: float, start: float, most: int = 12
) -> tuple[Any, float]:
    """The value whose cost is nearest to ``target``, by secants from ``start``, and that cost.

    Whole numbers stay whole and at least 1, others stay above 0.

    Raises:
        RequestError: the cost does not depend on the value.
    """
    whole = isinstance(start, int)
    known: dict[Any, float] = {}

    def at(value: float) -> float:
        kept = max(1, round(value)) if whole else max(float(f"{value:.5g}"), 1e-4 * start)
        if kept not in known:
            known[kept] = cost(kept)
        return kept

    a, b = at(start), at(start / 2 if start > 1 or not whole else start * 2)
    while len(known) < most:
        if known[a] == known[b]:
            raise RequestError(f"the planned cost is {known[a]:.4g} for {a:g} and for {b:g}")
        tried = len(known)
        a, b = b, at(b + (target - known[b]) * (a - b) / (known[a] - known[b]))
        if len(known) == tried:
            break
    best = min(known, key=lambda v: abs(known[v] - target))
    return best, known[best]


def _at(recipe: Mapping[str, Any], match: Match) -> float:
    here: Any = recipe
    for part in match.key.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    if isinstance(here, bool) or not isinstance(here, int | float) or not here > 0:
        raise RequestError(f"match.key {match.key} must be a number above 0, it is {here!r}")
    value: float = here
    return value


def _cost(planned: Mapping[str, Any], unit: str) -> float:
    if unit == "flops":
        return float(planned["flops"]["spent"])
    if unit == "samples":
        return float(planned["steps"] * planned["samples_per_step"])
    return float(planned[unit])


def _spent(runs: Sequence[Found], unit: str) -> float:
    found = [cost for run in runs if (cost := run.cost(unit)) is not None]
    if not found:
        raise RequestError(f'no run of "{runs[0].arm}" has {unit} in its ledger')
    return mean(found)


def _mean_signals(runs: Sequence[Found]) -> dict[str, dict[str, Any]]:
    """By method, the mean of each signal that is a number in every run, or a list of numbers."""
    every = [run.summary.get("methods") or {} for run in runs]
    found: dict[str, dict[str, Any]] = {}
    for name, signals in every[0].items():
        each = {key: [one.get(name, {}).get(key) for one in every] for key in signals}
        means = {key: _mean(values) for key, values in each.items()}
        found[name] = {key: value for key, value in means.items() if value is not None}
    return found


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of lists place by place, whole where all are; None of others."""
    if all(isinstance(value, int | float) for value in values):
        return mean(values)
    if not all(isinstance(value, list) for value in values) or len(set(map(len, values))) != 1:
        return None
    places = [_mean(place) for place in zip(*values, strict=True)]
    if None in places:
        return None
    whole = all(isinstance(item, int) for value in values for item in value)
    return [round(place) for place in places] if whole else places
