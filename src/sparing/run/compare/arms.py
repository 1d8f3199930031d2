"""The arms of a comparison: which, in which order, and the overrides that make each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from sparing.core import registry
from sparing.core.errors import RequestError, unknown
from sparing.run.declared import Arm, Compared, Match
from sparing.run.recipe import Recipe, load

RANDOM = "random at the cost of "


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """What ``sparing compare`` was asked for. budget: minutes; threads: of each run."""

    recipe: str
    out: Path
    seeds: int = 3
    arms: Sequence[str] | None = None
    baseline: str | None = None
    margin: str | None = None
    budget: float | None = None
    jobs: int = 1
    threads: int | None = None
    preset: str | None = None
    overrides: Sequence[str] = ()
    looks: int = 1
    level: float = 0.95
    command: str = ""

    def load(self, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe with its preset, the user's overrides, then these."""
        return load(self.recipe, [*self.overrides, *overrides], preset=self.preset)


@final
@dataclass(frozen=True, kw_only=True)
class Planned:
    """An arm to run; ``of`` is the arm that a generated one spends as much as."""

    name: str
    arm: Arm
    of: str | None = None
    settled: dict[str, Any] = field(default_factory=dict)
    """Keys and values that other arms' runs decided: matched and random arms."""
    tuned: dict[str, Any] = field(default_factory=dict)
    why_not: str = ""
    """Why it cannot be run; "" if it can."""

    @property
    def waits_for(self) -> str | None:
        """The arm whose finished runs decide this one's settings."""
        return self.of or (self.arm.match.to if self.arm.match else None)

    @property
    def slug(self) -> str:
        """Its directory's name."""
        return slug(self.name)

    def overrides(self) -> list[str]:
        """What makes the arm, as overrides of the recipe."""
        return as_overrides({**self.arm.set, **self.settled, **self.tuned})

    def load(self, asked: Asked, more: Sequence[str] = ()) -> Recipe:
        """Its recipe. Raises RequestError, naming the arm, if that is wrong."""
        try:
            return asked.load([*self.overrides(), *more])
        except RequestError as error:
            raise RequestError(f'the arm "{self.name}": {error}') from None

    def declared(self) -> dict[str, Any]:
        """What the page says of it."""
        told: dict[str, Any] = {"about": self.arm.about, "set": self.arm.set}
        match = self.arm.match
        if match:
            told["match"] = {"key": match.key, "to": match.to, "unit": match.unit}
        for key, value in (("settled", self.settled), ("tuned", self.tuned), ("of", self.of)):
            if value:
                told[key] = value
        return told


def slug(name: str) -> str:
    """A name as a directory: "top-k 2" is top-k-2."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "arm"


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """{key: value} as ``key=value``, the values in YAML that reads them back."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def choose(asked: Asked) -> tuple[list[Planned], Compared]:
    """The arms that were asked for, in the recipe's order, those that wait for others last.

    Raises:
        RequestError: the recipe has no arms, a name is unknown, the baseline or an arm to match
            is not among the chosen, or two arms would share a directory.
    """
    recipe = asked.load()
    if not recipe.arms:
        raise RequestError(
            f'the recipe "{recipe.name}" declares no arms to compare; add arms: {{name: {{set: '
            "{key: value}}} and compare: {baseline, margin}"
        )
    compared = _compared(recipe, asked)
    known = {name: Planned(name=name, arm=arm) for name, arm in recipe.arms.items()}
    offered = {n: p for p in known.values() if (n := RANDOM + p.name) and _selects(asked, p)}
    for name, source in offered.items():
        about = f"chance instead of choice, at the cost of {source.name}"
        known[name] = Planned(name=name, arm=Arm(about=about), of=source.name)
    if asked.arms is None:
        wanted = compared.random
        chosen = [
            p
            for p in known.values()
            if p.of is None or wanted is True or (isinstance(wanted, list) and p.of in wanted)
        ]
    else:
        for name in asked.arms:
            if name not in known:
                # every adaptive arm has one by chance: too many to list beside the declared ones
                listed = known if name.startswith(RANDOM.split()[0]) else recipe.arms
                raise unknown("arm", name, listed)
        chosen = [p for p in known.values() if p.name in asked.arms]
    _check(chosen, compared)
    return sorted(chosen, key=lambda p: p.waits_for is not None), compared


def generated(planned: Planned, signals: Mapping[str, Any], source: Recipe) -> Planned:
    """A random arm with the settings that the method of its source, and what it reported, ask."""
    settings: dict[str, Any] = {}
    match: Match | None = None
    for name, options in source.methods.items():
        instead = registry.method(name).at_random(options, signals.get(name, {}))
        if instead is None:
            continue
        settings[f"methods.{name}"] = None
        for random, chosen in instead.items():
            settings[f"methods.{random}"] = dict(chosen)
            if "k" in chosen:
                match = Match(key=f"methods.{random}.k", to=str(planned.of))
    arm = Arm(about=planned.arm.about, set=settings, match=match)
    return Planned(name=planned.name, arm=arm, of=planned.of)


def _compared(recipe: Recipe, asked: Asked) -> Compared:
    held = recipe.compare
    baseline = asked.baseline or (held.baseline if held else None)
    if baseline is None:
        raise RequestError(
            f'the recipe "{recipe.name}" names no baseline; give one of its arms by --baseline: '
            f"{', '.join(recipe.arms)}"
        )
    margin = asked.margin or (held.margin if held else None)
    if held is None:
        return Compared(baseline=baseline, margin=margin)
    if held.tune is not None:
        decides = getattr(registry.task(recipe.task["name"]), "evaluation", ())
        if not any(f"task.{option}" in held.tune.set for option in decides):
            raise RequestError(
                "compare.tune would choose settings by the data that the comparison judges by; "
                "give compare.tune.set other held-out data, such as {task.split: development}"
            )
    return Compared(baseline=baseline, margin=margin, random=held.random, tune=held.tune)


def _selects(asked: Asked, planned: Planned) -> bool:
    """Whether one of the arm's methods chooses what chance could choose instead."""
    recipe = planned.load(asked)
    return any(
        registry.method(name).at_random(options, {}) is not None
        for name, options in recipe.methods.items()
    )


def _check(chosen: Sequence[Planned], compared: Compared) -> None:
    names = [p.name for p in chosen]
    if compared.baseline not in names:
        raise RequestError(
            f'the baseline "{compared.baseline}" is not among the arms {", ".join(names)}; '
            "add it to --arms, or name another by --baseline"
        )
    for planned in chosen:
        if planned.waits_for and planned.waits_for not in names:
            raise RequestError(
                f'the arm "{planned.name}" spends what "{planned.waits_for}" does, which is not '
                "among the arms; add it to --arms"
            )
    slugs = [p.slug for p in chosen]
    for planned in chosen:
        if slugs.count(planned.slug) > 1:
            raise RequestError(
                f'two arms would share the directory "{planned.slug}"; rename "{planned.name}"'
            )
