"""How a mixture of sources went: sampling weights and losses by source, over training."""

from __future__ import annotations

from typing import Any, Final

from sparing.run.report.charts import Chart, Line, axis, chart
from sparing.run.report.read import Points, Run, number, points
from sparing.run.report.words import metric_name, percent, significant, visible

STYLES: Final = ("c1", "c3", "c4", "c5", "c6", "c2")


def mixture(run: Run) -> dict[str, Any] | None:
    """What the section shows, None where no method mixes sources.

    The page's ``mixture``: ``sources`` (D names), ``sizes``, ``drawn``, ``rule``, ``form``, and by
    tick ``steps``, ``weights`` and ``losses``, D numbers each, None where no loss is known.
    """
    given = run.page.get("mixture")
    if not isinstance(given, dict) or not given.get("sources"):
        return None
    names = [visible(str(name)) for name in given["sources"]]
    steps = [number(step) or 0.0 for step in given.get("steps") or []]
    weights = _columns(steps, given.get("weights") or [], len(names))
    losses = _columns(steps, given.get("losses") or [], len(names))
    held = [points(run.evals, "step", f"{run.metric}/{name}") for name in given["sources"]]
    last = max([x for series in (*weights, *held) for x, _ in series], default=1.0)
    charts = [
        _chart("mixture-weights", "sampling weight", names, weights, last, flat=True),
        _chart("mixture-losses", "training loss since the last tick", names, losses, last),
        _chart("mixture-held", f"{metric_name(run.metric)}, held out", names, held, last),
    ]
    drawn = [int(number(n) or 0) for n in given.get("drawn") or [0] * len(names)]
    sizes = [int(number(n) or 0) for n in given.get("sizes") or [0] * len(names)]
    whole, total = max(1, sum(drawn)), max(1, sum(sizes))
    rows = [
        {
            "name": name,
            "size": f"{sizes[i]:,} ({percent(sizes[i] / total)})",
            "drawn": f"{drawn[i]:,} ({percent(drawn[i] / whole)})",
            "times": f"{drawn[i] / sizes[i]:.2f}" if sizes[i] else "-",
            "first": _at(weights[i], 0),
            "last": _at(weights[i], -1),
            "loss": _at(held[i], -1) if held[i] else _at(losses[i], -1),
        }
        for i, name in enumerate(names)
    ]
    return {
        "rule": " ".join(str(given.get(key) or "") for key in ("rule", "form")).strip(),
        "charts": [drawn_ for drawn_ in charts if drawn_ is not None],
        "rows": rows,
        "held": any(held),
        "ticks": max(0, len(steps) - 1),
    }


def _columns(steps: list[float], rows: list[Any], count: int) -> list[Points]:
    """(step, value) of each source, where there is one."""
    found: list[Points] = [[] for _ in range(count)]
    for step, row in zip(steps, rows, strict=False):
        for place, value in enumerate((row or [])[:count]):
            known = number(value)
            if known is not None:
                found[place].append((step, known))
    return found


def _chart(
    key: str, title: str, names: list[str], series: list[Points], last: float, *, flat: bool = False
) -> Chart | None:
    ys = [y for part in series for _, y in part]
    if not ys:
        return None
    low, high = (0.0, max(ys)) if flat else (min(ys), max(ys))
    room = 0.06 * (high - low) or 0.1
    scale, x_name = axis(last, "steps")
    lines = []
    for place, (name, part) in enumerate(zip(names, series, strict=True)):
        if not part:
            continue
        # weights hold until the next tick, the last ones to the end
        held = [*part, (last, part[-1][1])] if flat and part[-1][0] < last else part
        style = STYLES[place % len(STYLES)]
        lines.append(Line(points=held, style=style, label=name, steps=flat))
    ends = ", ".join(
        f"{name} {significant(part[-1][1], 3)}"
        for name, part in zip(names, series, strict=True)
        if part
    )
    return chart(
        key,
        lines,
        title=f"{title} by source",
        description=f"at the end: {ends}",
        x_range=(0.0, last),
        y_range=(max(0.0, low - room) if flat else low - room, high + room),
        x_name=x_name,
        x_scale=scale,
    )


def _at(series: Points, place: int) -> str:
    return significant(series[place][1], 3) if series else "-"
