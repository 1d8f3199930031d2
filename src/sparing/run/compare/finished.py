"""A comparison of runs that are there: what each arm reached, at what cost, and the verdicts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import numpy as np

from sparing.core.errors import RequestError, RunError, unknown
from sparing.core.ledger import UNITS
from sparing.run.compare.found import MORE, Found, find, read_json
from sparing.run.compare.same import first_difference, main_code, require_same
from sparing.run.compare.statistics import Judgement, Margin, judge, parse_margin

STATE = "comparison.json"
_SEED = re.compile(r"seed-\d+")
Paths = Sequence[str | Path]


@final
@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm: its runs, the mean cost by unit, and the verdict against the baseline.

    ``declared`` is what the recipe says of it: ``about``, ``set``, and where they apply
    ``match``, ``settled`` and ``tuned``.
    """

    name: str
    runs: list[Found]
    judgement: Judgement | None = None
    declared: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> list[Found]:
        """The runs that came to their end with a finite metric."""
        return [run for run in self.runs if run.state == "finished"]

    @property
    def values(self) -> dict[int, float]:
        """seed -> metric of the finished runs."""
        return {int(run.seed or 0): run.value for run in self.finished}

    @property
    def mean(self) -> float | None:
        """The mean metric of the finished runs."""
        return float(np.mean(list(self.values.values()))) if self.values else None

    @property
    def costs(self) -> dict[str, float]:
        """The mean of the finished runs by unit of the ledger, and what it does not hold."""
        found = {}
        for unit in (*UNITS, *MORE):
            spent = [c for run in self.finished if (c := run.cost(unit)) is not None]
            if spent and len(spent) == len(self.finished):
                found[unit] = float(np.mean(spent))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, every run in it."""
        return {
            **self.declared,
            "mean": self.mean,
            "costs": self.costs,
            "runs": [_run_dict(run) for run in self.runs],
            "judgement": self.judgement.to_dict() if self.judgement else None,
        }


@final
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms against a baseline. ``about`` is what the command recorded of how it was made."""

    metric: str
    higher_is_better: bool
    task: str
    corpus: str
    baseline: str
    margin: Margin
    level: float
    looks: int
    arms: list[ArmResult]
    warnings: list[str]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The hash of the sources that made most runs."""
        return main_code([run for arm in self.arms for run in arm.finished])

    @property
    def missing(self) -> list[str]:
        """The runs that were asked for and have no result, in words."""
        return [
            f"{arm.name}, seed {run.seed}: {run.state}, {run.why}"
            for arm in self.arms
            for run in arm.runs
            if run.state != "finished"
        ]

    def arm(self, name: str) -> ArmResult:
        """The arm of that name. Raises RequestError, with the nearest one, if there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise unknown("arm", name, [arm.name for arm in self.arms])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: all that the page and a record need."""
        return {
            "format": 1,
            **self.about,
            "metric": {"name": self.metric, "higher_is_better": self.higher_is_better},
            "task": self.task,
            "corpus": self.corpus,
            "baseline": self.baseline,
            "margin": str(self.margin),
            "level": self.level,
            "looks": self.looks,
            "code": self.code,
            "arms": {arm.name: arm.to_dict() for arm in self.arms},
            "warnings": self.warnings,
            "missing": self.missing,
        }

    def page(self, path: str | Path) -> Path:
        """Write the page, one self-contained HTML file. Raises RequestError without jinja2."""
        from sparing.run.report.comparison import write

        return write(self, Path(path))

    def __str__(self) -> str:
        from sparing.run.compare.told import lines

        return "\n".join(lines(self))


def compare(
    runs: str | Path | Paths | Mapping[str, str | Path | Paths],
    *,
    baseline: str | None = None,
    margin: str | None = None,
    level: float | None = None,
    looks: int | None = None,
) -> Comparison:
    """Compare finished runs, pairing seeds, without running anything.

    runs: {arm: its run directories}, or a list of run directories (those in one directory
    ``ARM/seed-N``, or of equal settings, are one arm), or the directory of ``sparing compare``.
    baseline: the arm to compare with; margin: the difference that would not matter, such as
    ``"+-0.02 bits_per_byte"``; level: of the intervals, 0.95 unless told; looks: how many were
    planned, over which the error rate is split, 1 unless told. A directory of ``sparing compare``
    has all four.

    Raises:
        RequestError: the arms differ in task, data, evaluation or budget, a directory holds no
            run, an arm or the baseline is not there, or the margin is not spelled right.
        RunError: no run is finished.
    """
    about: dict[str, Any] = {}
    if isinstance(runs, str | Path) and (Path(runs) / STATE).is_file():
        held = read_json(Path(runs) / STATE)
        baseline, margin = baseline or held["baseline"], margin or held["margin"]
        level = held.get("level") if level is None else level
        looks = held.get("looks") if looks is None else looks
        declared = {name: arm.get("declared", {}) for name, arm in held["arms"].items()}
        about = held.get("about", {})
        found = {
            name: [_noted(find(Path(runs) / run["path"], name), run) for run in arm["runs"]]
            for name, arm in held["arms"].items()
        }
    else:
        found, declared = _found(runs), {}
    return judged(
        found,
        baseline=baseline,
        margin=margin,
        level=0.95 if level is None else level,
        looks=1 if looks is None else looks,
        declared=declared,
        about=about,
    )


def judged(
    found: Mapping[str, Sequence[Found]],
    *,
    baseline: str | None,
    margin: str | None,
    level: float = 0.95,
    looks: int = 1,
    declared: Mapping[str, Mapping[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Comparison:
    """The comparison of runs as found; see ``compare``."""
    declared = declared or {}
    if baseline is None:
        raise RequestError(f"name the baseline, one of the arms: {', '.join(found)}")
    if baseline not in found:
        raise unknown("arm as baseline", baseline, found)
    sets = {
        name: {
            key: value
            for part in ("set", "settled", "tuned")
            for key, value in d.get(part, {}).items()
        }
        for name, d in declared.items()
    }
    warnings = require_same(found, sets)
    runs = [run for each in found.values() for run in each if run.state == "finished"]
    if not runs:
        raise RunError(
            "no run is finished, so there is nothing to compare: "
            + "; ".join(f"{n}: {run.why}" for n, each in found.items() for run in each[:1])
        )
    summary = runs[0].summary
    metric, higher = summary["metric"]["name"], bool(summary["metric"]["higher_is_better"])
    if margin is None:
        worse = "-" if higher else "+"
        raise RequestError(
            "say how large a difference from the baseline would not matter, by margin: "
            f'"+-0.02 {metric}", or "{worse}0.02 {metric}" for one side'
        )
    size = parse_margin(margin, metric, higher)
    base = [run for run in found[baseline] if run.state == "finished"]
    arms = []
    for name, each in found.items():
        verdict = None
        good = [run for run in each if run.state == "finished"]
        if name != baseline and good and base:
            verdict = judge(
                {int(r.seed or 0): r.value for r in good},
                {int(r.seed or 0): r.value for r in base},
                margin=size, level=level, looks=looks, **_documents(good, base),
            )  # fmt: skip
        arms.append(
            ArmResult(
                name=name,
                runs=sorted(each, key=lambda run: (run.seed is None, run.seed)),
                judgement=verdict,
                declared=dict(declared.get(name, {})),
            )
        )
    return Comparison(
        metric=metric,
        higher_is_better=higher,
        task=str(summary.get("task", "")),
        corpus=str(summary.get("corpus", "")),
        baseline=baseline,
        margin=size,
        level=level,
        looks=looks,
        arms=arms,
        warnings=warnings,
        about=dict(about or {}),
    )


def _noted(run: Found, state: Mapping[str, Any]) -> Found:
    """What the comparison knows of a run that left no result itself."""
    if run.state in ("finished", "diverged"):
        return run
    return replace(run, seed=state["seed"], why=state["why"] or run.why)


def _documents(arm: Sequence[Found], baseline: Sequence[Found]) -> dict[str, Any]:
    """``documents`` and ``domains`` for ``judge``, {} where a run of the pairs has none."""
    ours, theirs = ({run.seed: run for run in runs} for runs in (arm, baseline))
    seeds = sorted(seed for seed in ours if seed in theirs and seed is not None)
    if len(seeds) < 2:
        return {}
    tables = [[side[seed].documents() for seed in seeds] for side in (ours, theirs)]
    shapes = [{name: each.shape for name, each in t.items()} for side in tables for t in side]
    if not shapes[0] or any(shape != shapes[0] for shape in shapes):
        return {}
    rows = [np.array([np.concatenate(list(t.values())) for t in side]) for side in tables]
    domains = np.concatenate([np.full(len(each), name) for name, each in tables[0][0].items()])
    return {"documents": (rows[0], rows[1]), "domains": domains}


def _found(runs: str | Path | Paths | Mapping[str, str | Path | Paths]) -> dict[str, list[Found]]:
    if isinstance(runs, Mapping):
        arms = {
            str(name): [paths] if isinstance(paths, str | Path) else list(paths)
            for name, paths in runs.items()
        }
        found = {name: [find(p, name) for p in paths] for name, paths in arms.items()}
    else:
        found = _grouped([runs] if isinstance(runs, str | Path) else runs)
    for each in found.values():
        for run in each:
            if run.state == "missing":
                raise RequestError(
                    f"{run.path} holds no run (no recipe.yaml, no summary.json); "
                    "give directories that `sparing run` or `sparing compare` wrote"
                )
    if not any(found.values()):
        raise RequestError("no run directory was given; name those of at least two arms")
    return found


def _grouped(paths: Paths) -> dict[str, list[Found]]:
    """Runs in ARM/seed-N by the name ARM, others by equal settings under the first one's name."""
    found: dict[str, list[Found]] = {}
    for path in map(Path, paths):
        run = find(path, path.name)
        if _SEED.fullmatch(path.name):
            name = path.resolve().parent.name
        else:
            alike = (n for n, r in found.items() if not first_difference(r[0].recipe, run.recipe))
            name = next(alike, path.name)
        found.setdefault(name, []).append(find(path, name))
    return found


def _run_dict(run: Found) -> dict[str, Any]:
    told: dict[str, Any] = {"seed": run.seed, "path": str(run.path), "state": run.state}
    if run.why:
        told["why"] = run.why
    if run.state == "finished":
        keys = ("metrics", "ledger", "methods", "steps", "tokens", "seconds", "environment", "code")
        told |= {"value": run.value, **{k: run.summary[k] for k in keys if k in run.summary}}
    return told
