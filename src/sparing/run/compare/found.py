"""Runs as they are found in their directories: finished, diverged, cut short, or not there."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sparing.core.errors import RequestError
from sparing.run.recipe import resolve

State = Literal["finished", "diverged", "unfinished", "missing"]
DIVERGED = "diverged.json"
DOCUMENTS = "documents.safetensors"
FORMAT = 1
MORE = ("seconds", "stored")
"""Costs that a ledger does not hold."""


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """One arm's run with one seed. ``why`` says what is wrong with one that is not finished."""

    arm: str
    seed: int | None
    path: Path
    state: State
    why: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The metric; only a finished run has one."""
        return float(self.summary["metric"]["value"])

    @property
    def code(self) -> str:
        """The hash of the sources that made the run."""
        return str(self.summary.get("code") or "")

    def cost(self, unit: str) -> float | None:
        """What was spent in a unit of the ledger, or of ``MORE``; None where it is not recorded.

        ``stored`` is the bytes of what the run wrote to be loaded again: of an adapter without its
        base.
        """
        if unit == "stored":
            files = [f for f in (self.path / "model").rglob("*") if f.is_file()]
            return float(sum(f.stat().st_size for f in files)) if files else None
        if unit == "seconds":
            spent = self.summary.get("seconds")
        else:
            spent = (self.summary.get("ledger") or {}).get(unit, {}).get("spent")
        return None if spent is None else float(spent)

    def documents(self) -> dict[str, np.ndarray]:
        """The metric of each held-out document by domain, {} where the run did not record them.

        Raises:
            RequestError: the file is damaged.
        """
        file = self.path / DOCUMENTS
        if not file.is_file():
            return {}
        try:
            return {name: np.asarray(each) for name, each in sorted(load_file(file).items())}
        except (OSError, SafetensorError) as error:
            raise RequestError(f"{file} cannot be read ({error}); delete it") from error


def find(path: str | Path, arm: str) -> Found:
    """The run in the directory ``path``.

    Raises:
        RequestError: a file is damaged, or was written by a newer version.
    """
    path = Path(path)
    recipe = _yaml(path / "recipe.yaml")
    seed = recipe.get("seed")
    known: dict[str, Any] = {"arm": arm, "seed": seed, "path": path, "recipe": recipe}
    if (path / "summary.json").is_file():
        summary = read_json(path / "summary.json")
        known["seed"] = summary.get("seed", seed)
        value = (summary.get("metric") or {}).get("value")
        if not isinstance(value, int | float) or not math.isfinite(value):
            why = f"its metric is {value}"
            return Found(**known, state="diverged", why=why, summary=summary)
        return Found(**known, state="finished", summary=summary)
    if (path / DIVERGED).is_file():
        why = str(read_json(path / DIVERGED).get("why", "the loss is not finite"))
        return Found(**known, state="diverged", why=why)
    if recipe:
        return Found(**known, state="unfinished", why="it was not run to its end")
    return Found(**known, state="missing", why="it was not run")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file that this version can read.

    Raises:
        RequestError: it is no JSON object, or a newer version wrote it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} is not JSON ({error}); delete it and run again") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path} must hold a JSON object, found {type(found).__name__}")
    if int(found.get("format", FORMAT)) > FORMAT:
        raise RequestError(
            f"{path} has format {found['format']}, this version reads up to {FORMAT}; "
            "upgrade sparing"
        )
    return found


@functools.lru_cache(512)
def _parsed(text: str) -> Any:
    """A recipe by its text, with options that came after it at their defaults.

    Those change nothing, and runs from before are like those of today. YAML is slow to read, and a
    comparison looks at the same recipes often; what is returned is never changed.
    """
    found = yaml.safe_load(text)
    try:
        return resolve(found).to_dict() if isinstance(found, dict) else found
    except RequestError:  # it has options that there are no longer, or another task
        return found


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RequestError(f"{path} cannot be read ({error}); delete its run") from error
    return found if isinstance(found, dict) else {}
