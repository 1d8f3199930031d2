"""Reads a run directory as it is found: finished, killed half-way, or barely begun."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from sparing.core.errors import RequestError

Row = dict[str, Any]
Points = list[tuple[float, float]]
FORMAT = 1
_KINDS = ("train", "eval")


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory holds; everything but the name may be empty."""

    name: str
    summary: Row
    page: Row
    recipe: str
    train: list[Row]
    evals: list[Row]
    events: list[Row]
    notes: list[str]

    @property
    def metric(self) -> str:
        """The name of the task's metric, ``bits_per_byte`` where nothing says otherwise."""
        return str((self.summary.get("metric") or {}).get("name") or "bits_per_byte")

    @property
    def higher_is_better(self) -> bool:
        """Which way the metric is better; False where nothing says otherwise."""
        return bool((self.summary.get("metric") or {}).get("higher_is_better", False))

    @property
    def value(self) -> float | None:
        """The run's result: the summary's, or the last evaluation's of a run that has none."""
        value = number((self.summary.get("metric") or {}).get("value"))
        if value is None and self.evals:
            value = number(self.evals[-1].get(self.metric))
        return value

    @property
    def last(self) -> Row:
        """The last training record, or {}."""
        return self.train[-1] if self.train else {}

    @property
    def references(self) -> dict[str, dict[str, float]]:
        """Values of the metric by reference method and domain (and ``mean``)."""
        found = self.page.get("references") or {}
        return {
            name: {k: v for k, v in values.items() if number(v) is not None}
            for name, values in found.items()
            if isinstance(values, dict)
        }

    @property
    def domains(self) -> list[str]:
        """The task's domains, in its own order where the run recorded it."""
        listed = self.page.get("domains")
        if listed:
            return [str(name) for name in listed]
        prefix = f"{self.metric}/"
        rows = self.evals[-1:] or [{}]
        return [key.removeprefix(prefix) for key in rows[0] if key.startswith(prefix)]

    @property
    def domain_name(self) -> str:
        """What the task calls its domains."""
        return str(self.page.get("domain_name") or "domain")

    @property
    def unit(self) -> str:
        """What training is measured in: samples where each was counted as one token."""
        last = self.last
        return "samples" if last and last.get("samples") == last.get("tokens") else "tokens"

    def domain_values(self, domain: str) -> Points:
        """(step, metric) of each evaluation of ``domain``."""
        return points(self.evals, "step", f"{self.metric}/{domain}")

    def ledger(self, unit: str) -> tuple[float, float] | None:
        """(spent, dense) of a unit, or None where the account does not have it."""
        entry = (self.summary.get("ledger") or {}).get(unit) or {}
        spent, dense = number(entry.get("spent")), number(entry.get("dense"))
        return None if spent is None else (spent, spent if dense is None else dense)


def number(value: Any) -> float | None:
    """``value`` where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def points(rows: list[Row], x: str, y: str) -> Points:
    """The finite pairs of two keys."""
    pairs = ((number(row.get(x)), number(row.get(y))) for row in rows)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def read(run_dir: Path) -> Run:
    """Read ``run_dir``.

    Raises:
        RequestError: it is no run directory, one of its files is no JSON, or it was written by a
            newer version.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise RequestError(f"{run_dir} is not a directory; give one that `sparing run` wrote")
    if not any((run_dir / f).is_file() for f in ("recipe.yaml", "metrics.jsonl", "summary.json")):
        raise RequestError(
            f"{run_dir} holds no run (no recipe.yaml, metrics.jsonl or summary.json); "
            "give a directory that `sparing run` wrote"
        )
    summary, page = _json(run_dir / "summary.json"), _json(run_dir / "page.json")
    rows, broken = _lines(run_dir / "metrics.jsonl")
    recipe = run_dir / "recipe.yaml"
    notes = []
    if broken:
        notes.append(f"{broken} unreadable line{'s' * (broken > 1)} of metrics.jsonl left out.")
    return Run(
        name=run_dir.resolve().name,
        summary=summary,
        page=page,
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        train=_last_by_step([row for row in rows if row.get("kind") == "train"]),
        evals=_last_by_step([row for row in rows if row.get("kind") == "eval"]),
        events=_events(rows),
        notes=notes,
    )


def _json(path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path} is not JSON ({error}); delete it or resume the run") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path} must hold a JSON object, found {type(found).__name__}")
    version = number(found.get("format", FORMAT)) or 0
    if version > FORMAT:
        raise RequestError(
            f"{path} has format {version}, this version reads up to {FORMAT}; upgrade sparing"
        )
    return found


def _lines(path: Path) -> tuple[list[Row], int]:
    """The objects of a JSON-lines file, and how many lines were none (a kill cuts the last)."""
    rows, broken = [], 0
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and number(row.get("step")) is not None:
                rows.append(row)
            else:
                broken += 1
    return rows, broken


def _last_by_step(rows: list[Row]) -> list[Row]:
    """One row a step, in order: steps that a resumed run did again were logged twice."""
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _events(rows: list[Row]) -> list[Row]:
    """Events as {step, event, layer, expert, why}, each once, in order of step."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.get("kind") in _KINDS:
            continue
        event = row.get("event") or row.get("what") or row.get("kind") or "event"
        key = (row["step"], event, str(row.get("layer")), str(row.get("expert")))
        found[key] = row | {"event": str(event)}
    return [found[key] for key in sorted(found, key=lambda key: (key[0], *map(str, key[1:])))]
