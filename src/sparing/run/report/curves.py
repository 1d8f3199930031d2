"""The loss of a run, or of several, against tokens and against FLOPs."""

from __future__ import annotations

import math
from typing import Final

from sparing.run.report.charts import Chart, Line, axis, chart, smooth, thin
from sparing.run.report.headline import mean_references
from sparing.run.report.read import Points, Run, points
from sparing.run.report.words import metric_name

AXES: Final = {"tokens": "tokens", "flops": "FLOP"}
REFERENCE_STYLES: Final = ("ref-a", "ref-b", "ref-c")
RUN_STYLES: Final = ("c1", "c3", "c4", "c5", "c6", "c2")


def training(run: Run, x: str) -> Points:
    """(x, training loss) in the metric's unit: nats become bits for ``bits_per_byte``."""
    scale = math.log(2) if run.metric == "bits_per_byte" else 1.0
    return [(a, b / scale) for a, b in points(run.train, x, "loss")]


def loss_charts(run: Run) -> list[Chart]:
    """Training loss and evaluations against each axis that the records have."""
    name = metric_name(run.metric)
    found = []
    for x, named in AXES.items():
        unit = run.unit if x == "tokens" else named
        raw, held_out = training(run, x), points(run.evals, x, run.metric)
        if run.metric != "bits_per_byte":
            raw = []  # another unit than the metric's: it has a chart of its own below
        curve = smooth(raw)
        references = sorted(mean_references(run).items())
        rules = [
            (value, REFERENCE_STYLES[i % 3], f"{key} {value:.2f}")
            for i, (key, value) in enumerate(references)
        ]
        y_range = _window(curve, held_out, [value for value, _, _ in rules])
        if y_range is None:
            continue
        last = max(p[0] for p in curve + held_out)
        scale, x_name = axis(last, unit)
        lines = [
            Line(points=thin(raw), style="raw"),
            Line(points=thin(curve), style="c1", label=_label("training", curve)),
            Line(points=held_out, style="ink", dots=True, label=_label("held out", held_out)),
        ]
        top = raw[0][1] if raw else 0.0
        enters = next((p[0] for p in curve if p[1] <= y_range[1]), 0.0)
        drawn = chart(
            f"loss-{x}",
            lines,
            title=f"{name} against {unit}{'s' * (unit == 'FLOP')}",
            description=_describe(name, curve, held_out, references),
            rules=rules,
            x_range=(0.0, last),
            y_range=y_range,
            x_name=x_name,
            x_scale=scale,
            note=(enters, f"from {top:.1f}") if top > y_range[1] else None,
        )
        if drawn:
            found.append(drawn)
    if run.metric != "bits_per_byte" and (raw := training(run, "tokens")):
        scale, x_name = axis(raw[-1][0], run.unit)
        drawn = chart(
            "train-loss",
            [Line(points=thin(raw), style="raw"), Line(points=thin(smooth(raw)), style="c1")],
            title=f"training loss against {run.unit}",
            description=_describe("training loss", smooth(raw), [], []),
            x_scale=scale,
            x_name=x_name,
        )
        found += [drawn] if drawn else []
    return found


def overlay(runs: list[Run]) -> list[Chart]:
    """The runs' smoothed training losses in one chart per axis, told apart by label and colour."""
    name = metric_name(runs[0].metric)
    found = []
    for x, named in AXES.items():
        unit = runs[0].unit if x == "tokens" else named
        curves = [(run, smooth(training(run, x))) for run in runs]
        curves = [(run, curve) for run, curve in curves if curve]
        if not curves:
            continue
        references = mean_references(runs[0])
        y_range = _window(curves[0][1], [c[-1] for _, c in curves], list(references.values()))
        last = max(curve[-1][0] for _, curve in curves)
        scale, x_name = axis(last, unit)
        drawn = chart(
            f"{runs[0].name}-{x}",
            [
                Line(points=thin(c, 160), style=RUN_STYLES[i % 6], label=run.name)
                for i, (run, c) in enumerate(curves)
            ],
            title=f"training loss ({name}) against {unit}{'s' * (unit == 'FLOP')}",
            description="; ".join(f"{run.name} ends at {c[-1][1]:.2f}" for run, c in curves),
            rules=[
                (value, REFERENCE_STYLES[i % 3], f"{key} {value:.2f}")
                for i, (key, value) in enumerate(sorted(references.items()))
            ],
            x_range=(0.0, last),
            y_range=y_range,
            x_name=x_name,
            x_scale=scale,
        )
        found += [drawn] if drawn else []
    return found


def _window(curve: Points, held_out: Points, rules: list[float]) -> tuple[float, float] | None:
    """The y range that shows where the run went, not the fall of its first steps."""
    if not curve and not held_out:
        return None
    main = curve or held_out
    settled = [y for _, y in main[len(main) // 10 :] + held_out[-1:]] + rules
    low, high = min(settled), max(settled)
    room = 0.08 * (high - low) or 0.1
    return low - room, high + room


def _label(name: str, series: Points) -> str:
    return f"{name} {series[-1][1]:.2f}" if series else ""


def _describe(
    name: str, curve: Points, held_out: Points, references: list[tuple[str, float]]
) -> str:
    parts = []
    if curve:
        parts.append(f"Training {name} goes from {curve[0][1]:.2f} to {curve[-1][1]:.2f}")
    if held_out:
        parts.append(f"on held-out data the last of {len(held_out)} evaluations is "
                     f"{held_out[-1][1]:.2f}")  # fmt: skip
    parts += [f"reference {key} is at {value:.2f}" for key, value in references]
    return "; ".join(parts) + "."
