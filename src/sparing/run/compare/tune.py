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


def overrides(tune: Tune, tried: dict[str, Any]) -> list[str]:
    """What a run of one combination adds to its arm."""
    return [*as_overrides({**tune.set, **tried}), f"seed={tune.seed}"]


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
        "tried": [
            {"set": tried, "value": run.value if run.state == "finished" else None}
            for tried, run in runs
        ],
    }
    if not good:
        return {**told, "note": "every combination diverged; the recipe's own values are used"}
    sign = -1 if good[0][1].summary["metric"]["higher_is_better"] else 1
    best = min(good, key=lambda each: sign * each[1].value)[0]
    edges = [
        key
        for key, values in tune.keys.items()
        if len(values) > 1 and best[key] in (values[0], values[-1])
    ]
    note = f"the best {', '.join(edges)} is at the end of what was tried" if edges else ""
    return {**told, "chosen": best, "note": note}
