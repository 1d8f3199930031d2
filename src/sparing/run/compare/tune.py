"""Settings chosen once for each arm by the same rule, on data that the comparison does not use."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparing.core.state import atomic_write_json
from sparing.run.compare.arms import Planned, as_overrides
from sparing.run.compare.found import Found, read_json
from sparing.run.declared import Tune
from sparing.run.recipe import Train

FILE = "tuning.json"


def read(directory: Path) -> dict[str, Any]:
    """By arm what was chosen in earlier calls, {} at first."""
    file = directory / FILE
    found: dict[str, Any] = read_json(file)["arms"] if file.is_file() else {}
    return found


def write(directory: Path, chosen: dict[str, Any]) -> None:
    """Keep what was chosen."""
    atomic_write_json(directory / FILE, {"format": 1, "arms": chosen})


def settings(tune: Tune) -> Iterator[dict[str, Any]]:
    """Every combination of the keys' values, in their order."""
    for values in itertools.product(*tune.keys.values()):
        yield dict(zip(tune.keys, values, strict=True))


def place(directory: Path, planned: Planned, tried: dict[str, Any]) -> Path:
    """Where the run of one combination goes."""
    name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in tried.items())
    return directory / "tuning" / planned.slug / name.replace("/", "-")


def overrides(tune: Tune, tried: dict[str, Any], train: Train) -> list[str]:
    """What a run of one combination adds to its arm, which trains by ``train``."""
    budget = {
        f"train.{unit}": max(1, round(tune.part * whole))
        for unit, whole in (("tokens", train.tokens), ("epochs", train.epochs))
        if whole is not None and tune.part < 1
    }
    return [*as_overrides({**budget, **tune.set, **tried}), f"seed={tune.seed}"]


def _at_the_end(value: Any, values: Sequence[Any]) -> bool:
    """Whether a better value may lie beyond those tried; only numbers have an order."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return 1 < len(values) == len(numbers) and value in (min(numbers), max(numbers))


def choose(tune: Tune, runs: Sequence[tuple[dict[str, Any], Found]]) -> dict[str, Any] | None:
    """The best combination of an arm and all that were tried; None while one is not finished.

    A diverged run loses. If all diverged, nothing is chosen: the arm keeps the recipe's values.
    """
    if any(run.state not in ("finished", "diverged") for _, run in runs):
        return None
    good = [(tried, run) for tried, run in runs if run.state == "finished"]
    told: dict[str, Any] = {
        "chosen": {},
        "seed": tune.seed,
        "set": tune.set,
        "part": tune.part,
        "better_by": tune.better_by,
        "tried": [
            {"set": tried, "value": run.value if run.state == "finished" else None}
            for tried, run in runs
        ],
    }
    if not good:
        return {**told, "note": "every combination diverged; the recipe's own values are used"}
    sign = -1 if good[0][1].summary["metric"]["higher_is_better"] else 1
    best, found = min(good, key=lambda each: sign * each[1].value)
    if good[0][0] == runs[0][0] and sign * (good[0][1].value - found.value) <= tune.better_by:
        best = runs[0][0]
    edges = [key for key, values in tune.keys.items() if _at_the_end(best[key], values)]
    note = f"the best {', '.join(edges)} is at the end of what was tried" if edges else ""
    return {**told, "chosen": best, "note": note}
