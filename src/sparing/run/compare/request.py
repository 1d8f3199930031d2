"""A request to compare, checked whole before anything is spent."""

from __future__ import annotations

from itertools import pairwise

from sparing.core import registry
from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.run.compare.arms import Asked, Planned, choose
from sparing.run.compare.finished import STATE
from sparing.run.compare.statistics import parse_margin
from sparing.run.declared import Compared

_OURS = (".lock", f".{STATE}.writing")


def checked(asked: Asked) -> tuple[list[Planned], Compared]:
    """The arms to run and how they are compared; nothing is written.

    Raises:
        RequestError: a number is out of range, an arm, the baseline or the margin is wrong, or
            the directory holds something else.
    """
    require_whole("seeds", asked.seeds, 1)
    require_whole("jobs", asked.jobs, 1)
    require_whole("looks", asked.looks, 1)
    require_number("level", asked.level, 0.5, 1)
    if asked.looks > asked.seeds:
        raise RequestError(f"looks must be at most seeds ({asked.seeds}), got {asked.looks}")
    if asked.budget is not None:
        require_number("budget", asked.budget, 0)
    arms, compared = choose(asked)
    kind = registry.task(asked.load().task["name"])
    if compared.margin is None:
        raise RequestError(
            "say how large a difference from the baseline would not matter, by --margin, such as "
            f'"+-0.02 {kind.metric}"'
        )
    parse_margin(compared.margin, kind.metric, kind.higher_is_better)
    for planned in arms:  # every arm is a right recipe before the first is run
        if planned.of is None:
            planned.load(asked)
    if asked.out.exists() and not asked.out.is_dir():
        raise RequestError(f"{asked.out} is not a directory; choose another by --out")
    if asked.out.is_dir() and not (asked.out / STATE).is_file():
        others = [e.name for e in asked.out.iterdir() if e.name not in _OURS]
        if others:
            raise RequestError(
                f"{asked.out} is not empty and holds no comparison; choose another directory by "
                "--out"
            )
    return arms, compared


def chunks_of(seeds: list[int], looks: int) -> list[list[int]]:
    """Seeds in ``looks`` blocks whose sizes differ by one at most."""
    cuts = [round(i * len(seeds) / looks) for i in range(looks + 1)]
    return [seeds[a:b] for a, b in pairwise(cuts)]
