"""How the arms of a comparison learned, as charts against tokens and FLOPs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparing.run.report import words
from sparing.run.report.charts import Chart, Line, Mark, axis, chart, smooth, thin
from sparing.run.report.curves import AXES
from sparing.run.report.read import Points, points, read
from sparing.run.report.scatter import style, window

if TYPE_CHECKING:
    from sparing.run.compare.finished import ArmResult, Comparison

Series = list[tuple[Any, Points]]
"""Runs of one arm with what is drawn of each."""


def learned(comparison: Comparison) -> tuple[list[Chart], str]:
    """The charts, and what they show: evaluations, or training losses where runs have no two."""
    by_axis = {x: _series(comparison, x, comparison.metric) for x in AXES}
    if any(len(line) > 1 for arms in by_axis.values() for each in arms for _, line in each):
        about = "Evaluations on held-out data: the mean over seeds, and thin each seed."
        return _evaluations(comparison, by_axis), about
    about = "Training losses, smoothed, the mean over seeds: the runs were evaluated only once."
    return _losses(comparison), about


def _evaluations(comparison: Comparison, by_axis: dict[str, list[Series]]) -> list[Chart]:
    """Each arm's mean, each seed, and marks where one diverged."""
    metric, found = comparison.metric, []
    finals = [arm.mean for arm in comparison.arms if arm.mean is not None]
    if not finals:
        return []
    low, high = window(finals, comparison.higher_is_better)
    for x, arms in by_axis.items():
        lines: list[Line] = []
        marks: list[Mark] = []
        ends: list[float] = []
        settled: list[float] = []
        for number, (arm, each) in enumerate(zip(comparison.arms, arms, strict=True), start=1):
            colour = style(number)
            for run, series in each:
                lines.append(Line(points=series, style=f"{colour} thin"))
                if run.state == "diverged":
                    marks.append(
                        Mark(x=series[-1][0], y=series[-1][1], style="down",
                             text=f"{arm.name}, seed {run.seed} diverged: {run.why}")
                    )  # fmt: skip
            mean = _mean([series for run, series in each if run.state == "finished"])
            if not mean:
                continue
            ends.append(max(p[0] for p in mean))
            inside = low <= (arm.mean or low) <= high
            label = f"{number} {arm.name}" if inside else ""
            lines.append(Line(points=mean, style=colour, label=label))
            if inside:
                settled += _late(mean, 0.3, ends[-1])
        if not ends:
            continue
        last = max(ends)
        low_y, high_y = _range(settled)
        drawn = _chart(
            x,
            lines,
            comparison,
            words.metric_name(metric),
            last=last,
            y_range=(low_y, high_y),
            marks=[m for m in marks if m.x <= last and low_y <= m.y <= high_y],
        )
        found += [drawn] if drawn else []
    return found


def _losses(comparison: Comparison) -> list[Chart]:
    """Each arm's mean training loss."""
    found = []
    for x in AXES:
        lines, settled, last = [], [], 0.0
        arms = _series(comparison, x, "loss")
        for number, (arm, each) in enumerate(zip(comparison.arms, arms, strict=True), start=1):
            mean = thin(smooth(_mean([line for run, line in each if run.state == "finished"]), 0.1))
            if len(mean) > 1:
                last = max(last, mean[-1][0])
                lines.append(Line(points=mean, style=style(number), label=f"{number} {arm.name}"))
                settled += _late(mean, 0.2, mean[-1][0])
        if lines:
            drawn = _chart(
                x, lines, comparison, "training loss", last=last, y_range=_range(settled)
            )
            found += [drawn] if drawn else []
    return found


def _chart(
    x: str,
    lines: list[Line],
    comparison: Comparison,
    name: str,
    *,
    last: float,
    y_range: tuple[float, float],
    marks: list[Mark] | None = None,
) -> Chart | None:
    unit = _unit(comparison) if x == "tokens" else AXES[x]
    scale, x_name = axis(last, unit)
    ends = (f"{a.name} ends at {a.mean:.3f}" for a in comparison.arms if a.mean is not None)
    return chart(
        f"curve-{x}",
        lines,
        title=f"{name} against {unit}{'s' * (unit == 'FLOP')}",
        description="; ".join(ends),
        marks=marks or [],
        x_range=(0.0, last),
        y_range=y_range,
        x_name=x_name,
        x_scale=scale,
    )


def _late(line: Points, share: float, end: float) -> list[float]:
    """The values after the first ``share`` of the run, at least the last one."""
    return [y for at, y in line if at >= share * end] or [line[-1][1]]


def _range(settled: list[float]) -> tuple[float, float]:
    room = 0.06 * (max(settled) - min(settled)) or 0.1
    return min(settled) - room, max(settled) + room


def _unit(comparison: Comparison) -> str:
    """What training is measured in, by the first run that was recorded."""
    runs = (run for arm in comparison.arms for run in arm.runs if run.path.is_dir())
    return next((read(run.path).unit for run in runs if run.state == "finished"), "tokens")


def _series(comparison: Comparison, x: str, key: str) -> list[Series]:
    return [_of_arm(arm, x, key) for arm in comparison.arms]


def _of_arm(arm: ArmResult, x: str, key: str) -> Series:
    found = []
    for run in arm.runs:
        if run.state in ("finished", "diverged") and run.path.is_dir():
            recorded = read(run.path)
            series = points(recorded.train if key == "loss" else recorded.evals, x, key)
            if series:
                found.append((run, series))
    return found


def _mean(series: list[Points]) -> Points:
    """The mean curve over seeds, as far as all of them go."""
    return [
        (sum(x for x, _ in at) / len(at), sum(y for _, y in at) / len(at))
        for at in zip(*series, strict=False)
    ]
