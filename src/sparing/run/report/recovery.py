"""What a trained model was before, at the start of training, and on the way, by domain."""

from __future__ import annotations

from typing import Any, Final

from sparing.run.report.charts import Chart, Line, axis, chart
from sparing.run.report.curves import AXES, RUN_STYLES
from sparing.run.report.read import Points, Run, number, points
from sparing.run.report.words import metric_name, significant, visible

BEFORE: Final = "before"
"""The reference of tasks that train a trained model on: what it reached as it came."""


def recovery(run: Run) -> dict[str, Any] | None:
    """Rows and charts by domain, None for a run that was not evaluated before its first step."""
    if not run.domains or len(run.evals) < 2 or number(run.evals[0].get("step")) != 0:
        return None
    before = run.references.get(BEFORE) or {}
    keys = {**{name: f"{run.metric}/{name}" for name in run.domains}, "mean": run.metric}
    rows = []
    for name, key in keys.items():
        series = points(run.evals, "step", key)
        if len(series) < 2:
            continue
        rows.append(
            {
                "name": visible(name),
                "before": _text(number(before.get(name))),
                "start": _text(series[0][1]),
                "end": _text(series[-1][1]),
                "recovered": _share(number(before.get(name)), series[0][1], series[-1][1]),
            }
        )
    drawn = [_chart(run, x, keys, before) for x in AXES]
    return {
        "rows": rows,
        "before": bool(before),
        "charts": [found for found in drawn if found is not None],
    }


def _share(before: float | None, start: float, end: float) -> str:
    """How much of what was lost at the start has come back, in percent."""
    if before is None or start == before:
        return "-"
    share = (start - end) / (start - before)
    return "all, and more" if share > 1 else f"{100 * share:.0f} %"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _chart(run: Run, x: str, keys: dict[str, str], before: dict[str, float]) -> Chart | None:
    series: dict[str, Points] = {name: points(run.evals, x, key) for name, key in keys.items()}
    series = {name: part for name, part in series.items() if len(part) > 1}
    if not series:
        return None
    ys = [y for part in series.values() for _, y in part]
    known = number(before.get("mean"))
    ys += [] if known is None else [known]
    last = max(part[-1][0] for part in series.values())
    room = 0.06 * (max(ys) - min(ys)) or 0.1
    unit = run.unit if x == "tokens" else AXES[x]
    scale, x_name = axis(last, unit)
    lines = [
        Line(
            points=part,
            style="ink" if name == "mean" else RUN_STYLES[place % len(RUN_STYLES)],
            label=f"{visible(name)} {part[-1][1]:.2f}",
        )
        for place, (name, part) in enumerate(series.items())
    ]
    told = ", ".join(
        f"{name} from {significant(p[0][1], 3)} to {significant(p[-1][1], 3)}"
        for name, p in series.items()
    )
    return chart(
        f"recovery-{x}",
        lines,
        title=f"{metric_name(run.metric)} against {unit}{'s' * (unit == 'FLOP')}, by domain",
        description=told,
        rules=[] if known is None else [(known, "ref-a", f"{BEFORE}, mean {known:.2f}")],
        x_range=(0.0, last),
        y_range=(min(ys) - room, max(ys) + room),
        x_name=x_name,
        x_scale=scale,
    )
