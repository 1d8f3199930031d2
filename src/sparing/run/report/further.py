"""What a task shows beside its metric: further metrics over the run, and tables."""

from __future__ import annotations

from typing import Any, Final

from sparing.run.report.charts import Chart, Line, axis, chart
from sparing.run.report.read import Run, number, points
from sparing.run.report.words import metric_name, significant


def charts(run: Run) -> list[Chart]:
    """The metrics that the page names under ``also``, each over samples and over steps.

    The task's own metric comes first, over steps alone: over samples it is drawn elsewhere.
    """
    named = run.page.get("also")
    if not isinstance(named, dict):
        return []
    found = []
    for key, title in [(run.metric, metric_name(run.metric)), *named.items()]:
        for x in ("tokens", "step"):
            if key == run.metric and x == "tokens":
                continue
            drawn = _chart(run, str(key), str(title), x)
            found += [drawn] if drawn else []
    return found


def _chart(run: Run, key: str, title: str, x: str) -> Chart | None:
    series = points(run.evals, x, key)
    if not series:
        return None
    unit = "steps" if x == "step" else run.unit
    scale, x_name = axis(series[-1][0], unit)
    last = significant(series[-1][1], 4)
    low, high = min(y for _, y in series), max(y for _, y in series)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    return chart(
        f"also-{key}-{x}".replace("_", "-"),
        [
            Line(points=series, style="c1"),
            Line(points=series, style="ink", dots=True, label=last),
        ],
        title=f"{title}, against {unit}",
        description=f"the last of {len(series)} evaluations is {last}",
        x_range=(0.0, series[-1][0]),
        y_range=(low - room, high + room),
        x_name=x_name,
        x_scale=scale,
    )


_KEYS: Final = ("title", "about")


def tables(run: Run) -> list[dict[str, Any]]:
    """The page's ``tables``: title, about, head, rows as texts, and whether a column is numbers."""
    found = []
    for table in run.page.get("tables") or []:
        head = [str(name) for name in table.get("head") or []]
        rows = [[str(cell) for cell in row] for row in table.get("rows") or []]
        if not head or not rows or any(len(row) != len(head) for row in rows):
            continue
        found.append({**{key: str(table.get(key) or "") for key in _KEYS}, "head": head,
                      "rows": rows, "words": int(number(table.get("words")) or 0)})  # fmt: skip
    return found
