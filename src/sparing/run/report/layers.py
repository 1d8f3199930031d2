"""The experts: how many are alive, how many act on a token, and who does what."""

from __future__ import annotations

import math
import re
from typing import Any

from sparing.run.report.charts import Line, Mark, chart
from sparing.run.report.passages import LEVELS
from sparing.run.report.read import Points, Row, Run, number
from sparing.run.report.words import layer_name, percent


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(p), "") if p.isdigit() else (0, p) for p in re.split(r"(\d+)", text)]


def names(run: Run) -> list[str]:
    """The module paths of the expert layers, in order of depth."""
    found = {str(k) for key in ("history", "load", "k_counts") for k in run.page.get(key) or {}}
    return sorted(found or _from_signals(run), key=_natural)


def _from_signals(run: Run) -> dict[str, Any]:
    """A history of means over layers from the training records: all that a killed run left."""
    found: dict[str, list[float]] = {"steps": [], "alive": [], "mean_k": [], "unserved": []}
    for row in run.train:
        for signals in (row.get("signals") or {}).values():
            alive = signals.get("alive") if isinstance(signals, dict) else None
            if isinstance(alive, list) and alive and number(signals.get("mean_k")) is not None:
                found["steps"].append(row["step"])
                found["alive"].append(sum(alive) / len(alive))
                found["mean_k"].append(signals["mean_k"])
                found["unserved"].append(signals.get("unserved", math.nan))
    return {"mean of all layers": found} if found["steps"] else {}


def cards(run: Run) -> list[dict[str, Any]]:
    """One card a layer: alive and mean k over steps with events, unserved share, k's counts."""
    history, counts = run.page.get("history") or {}, run.page.get("k_counts") or {}
    history = history or _from_signals(run)
    layers = names(run)
    top = max((v for n in layers for _, v in _series(history.get(n), "alive")), default=1.0)
    most = max((v for n in layers for _, v in _series(history.get(n), "unserved")), default=0.0)
    last = max((s for n in layers for s, _ in _series(history.get(n), "mean_k")), default=1.0)
    found = []
    for i, name in enumerate(layers):
        alive, mean_k = _series(history.get(name), "alive"), _series(history.get(name), "mean_k")
        unserved = _series(history.get(name), "unserved")
        events = [row for row in run.events if str(row.get("layer")) == name]
        alive = _with_events(alive, [row["step"] for row in events])
        label = layer_name(name)
        found.append(
            {
                "name": label,
                "path": name,
                "experts": chart(
                    f"layer-{i}",
                    [
                        Line(points=alive, style="c1", steps=True, label=_end("alive", alive, 0)),
                        Line(points=mean_k, style="c2", label=_end("mean k", mean_k, 1)),
                    ],
                    title=f"{label}: experts alive and mean experts per token",
                    description=_describe(alive, mean_k, len(events)),
                    marks=[_mark(row, alive) for row in events],
                    x_range=(0.0, last),
                    y_range=(0.0, top * 1.12),
                    x_name="step",
                    x_about=3,
                    y_about=4,
                    gap=14,
                ),
                "unserved": chart(
                    f"unserved-{i}",
                    [Line(points=unserved, style="c3", label=_share(unserved))],
                    title=f"{label}: tokens that no expert wanted, before fallback",
                    description=f"ends at {_share(unserved)}",
                    x_range=(0.0, last),
                    y_range=(0.0, most or 1.0),
                    y_about=1,
                    x_about=1,
                    gap=30,
                ),
                "k": _distribution(counts.get(name)),
            }
        )
    return found


def heat(run: Run) -> dict[str, Any] | None:
    """Expert load by domain: of a domain's routed rows in a layer, the share of each expert."""
    load, domains = run.page.get("load") or {}, run.domains
    layers = [name for name in names(run) if load.get(name)]
    if not layers:
        return None
    shares = {name: [_shares(row) for row in load[name]] for name in layers}
    peak = max((v for rows in shares.values() for row in rows for v in row), default=0.0)
    labels = [
        domains[d] if d < len(domains) else f"domain {d}"
        for d in range(max(len(rows) for rows in shares.values()))
    ]
    groups = [
        {
            "name": layer_name(name),
            "path": name,
            "rows": [
                (label, [_cell(v, peak) for v in row])
                for label, row in zip(labels, rows, strict=False)
            ],
        }
        for name, rows in shares.items()
    ]
    return {
        "groups": groups,
        "experts": max(len(row) for rows in shares.values() for row in rows),
        "peak": percent(peak),
        "sentence": _sharpest(shares, labels),
    }


def _cell(share: float, peak: float) -> tuple[int, str, bool]:
    """Level of the ramp, percentage, and whether there is any load."""
    return round((LEVELS - 1) * share / peak) if peak else 0, f"{100 * share:.0f}", share > 0


def _sharpest(shares: dict[str, list[list[float]]], labels: list[str]) -> str:
    """A sentence on the expert whose share differs most between two domains."""
    found, widest = "", 0.0
    for name, rows in shares.items():
        for expert in range(min(map(len, rows), default=0)):
            column = [(row[expert], label) for row, label in zip(rows, labels, strict=False)]
            (low, least), (high, most) = min(column), max(column)
            if high - low > widest:
                widest = high - low
                found = (
                    f"The most specialised is expert {expert} of {layer_name(name)}: it does "
                    f"{percent(high)} of that layer's work on {most} and "
                    f"{percent(low)} on {least}."
                )
    return found


def _series(history: Any, key: str) -> Points:
    """(step, value) of one statistic of a layer, finite values only."""
    if not isinstance(history, dict):
        return []
    steps, values = history.get("steps") or [], history.get(key) or []
    pairs = ((number(s), number(v)) for s, v in zip(steps, values, strict=False))
    return [(s, v) for s, v in pairs if s is not None and v is not None]


def _mark(row: Row, alive: Points) -> Mark:
    before = [v for step, v in alive if step <= row["step"]]
    added = "add" in row["event"]
    expert = f" (expert {row['expert']})" if "expert" in row else ""
    return Mark(
        x=row["step"],
        y=before[-1] if before else 0.0,
        style="up" if added else "down",
        text=f"step {row['step']:,}: {row['event']}{expert}",
    )


def _with_events(alive: Points, steps: list[float]) -> Points:
    """``alive`` that changes at the step of an event, not at the next point of the history."""
    if not alive:
        return []
    later = [(t, next((v for s, v in alive if s > t), alive[-1][1])) for t in steps]
    return sorted(alive + later, key=lambda point: point[0])


def _end(name: str, series: Points, digits: int) -> str:
    return f"{name} {series[-1][1]:.{digits}f}" if series else ""


def _share(series: Points) -> str:
    return percent(series[-1][1], 1) if series else "not recorded"


def _describe(alive: Points, mean_k: Points, events: int) -> str:
    parts = []
    if alive:
        parts.append(f"Experts alive go from {alive[0][1]:.0f} to {alive[-1][1]:.0f}")
    if mean_k:
        parts.append(f"the mean experts per token from {mean_k[0][1]:.2f} to {mean_k[-1][1]:.2f}")
    return ", ".join([*parts, f"{events} experts added or removed"]) + "."


def _distribution(counts: Any) -> list[dict[str, Any]]:
    """Bars of the share of tokens that took 0, 1, 2 ... experts, without an empty tail."""
    values = [number(v) or 0.0 for v in counts] if isinstance(counts, list) else []
    while values and not values[-1]:
        values.pop()
    total, peak = sum(values), max(values, default=0.0)
    return [
        {"k": k, "height": round(v / peak, 3), "share": percent(v / total)}
        for k, v in enumerate(values)
    ]


def _shares(row: Any) -> list[float]:
    values = [number(v) or 0.0 for v in row] if isinstance(row, list) else []
    total = sum(values)
    return [v / total if total else 0.0 for v in values]
