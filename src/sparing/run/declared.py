"""What a recipe declares for comparisons: arms, their baseline, and how settings are chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown


@final
@dataclass(frozen=True, kw_only=True)
class Match:
    """Solve ``key`` so that the planned cost in ``unit`` is what the arm ``to`` really spent."""

    key: str
    to: str
    unit: Literal["flops", "parameters", "tokens", "samples"] = "flops"


@final
@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: overrides of the recipe, and a key whose value is solved where ``match`` says."""

    about: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    match: Match | None = None

    def __post_init__(self) -> None:
        # JSON, in which comparisons are written, has no infinities; options read them by name
        told = {k: str(v) if v in (math.inf, -math.inf) else v for k, v in self.set.items()}
        object.__setattr__(self, "set", told)


@final
@dataclass(frozen=True, kw_only=True)
class Tune:
    """Settings chosen once per arm by the same rule: all values of ``keys`` in every combination.

    They are tried with the overrides ``set`` (which must choose other held-out data than the
    comparison's), with ``seed``, for the share ``part`` of the budget. The first combination is
    kept unless the best metric is better by more than ``better_by``, in the metric's unit: what
    chance alone moves should not decide.
    """

    keys: dict[str, list[Any]]
    set: dict[str, Any] = field(default_factory=dict)
    seed: int = 1000
    part: float = 1.0
    better_by: float = 0.0

    def __post_init__(self) -> None:
        require_whole("tune.seed", self.seed, 0)
        if not 0 < self.part <= 1:
            raise RequestError(f"tune.part must be in (0, 1], got {self.part}")
        if not self.better_by >= 0:
            raise RequestError(f"tune.better_by must be at least 0, got {self.better_by}")
        if not self.keys or not all(self.keys.values()):
            raise RequestError(
                "tune.keys must name at least one key, each with the values to try, such as "
                "{train.learning_rate: [1e-3, 3e-3]}"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Compared:
    """How the arms are compared.

    baseline: the arm that all others are compared with. margin: a difference too small to matter,
    with its sign and unit, ``+-0.02 bits_per_byte``. random: for which arms one is generated that
    spends the same at random: True for all whose method offers it, or their names. tune: see Tune.
    """

    baseline: str
    margin: str | None = None
    random: bool | list[str] = True
    tune: Tune | None = None


def check(arms: Mapping[str, Arm], compared: Compared | None) -> None:
    """Raise RequestError for arms that cannot be asked for, or name arms which are not there."""
    for name, arm in arms.items():
        if "," in name:
            raise RequestError(f'an arm has a comma in its name, by which --arms parts: "{name}"')
        if arm.match is None:
            continue
        where = f"arm in arms.{name}.match.to"
        if arm.match.to not in arms:
            raise unknown(where, arm.match.to, [other for other in arms if other != name])
        if arm.match.to == name or arms[arm.match.to].match is not None:
            raise RequestError(
                f"arms.{name}.match.to is {arm.match.to}, whose cost is itself matched; "
                "name an arm that has no match"
            )
    if compared is None:
        return
    if compared.baseline not in arms:
        raise unknown("arm in compare.baseline", compared.baseline, arms)
    for name in compared.random if isinstance(compared.random, list) else ():
        if name not in arms:
            raise unknown("arm in compare.random", name, arms)
