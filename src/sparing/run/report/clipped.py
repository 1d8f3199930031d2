"""Which rows of tables had their gradients clipped: over time, and by how often their ids came."""

from __future__ import annotations

from typing import Any, Final

from sparing.run.report.charts import Chart, Line, axis, chart, smooth, thin
from sparing.run.report.read import Run, number
from sparing.run.report.words import percent, significant, visible

MOST: Final = 6
"""Tables whose norms are shown; of more, those are left out that come after these."""


def clipped(run: Run) -> dict[str, Any] | None:
    """What the section shows, None where no method clips rows.

    The page's ``rows_clipped``: ``frequencies``, the least of each bin; by bin the rows that took
    part in steps, ``present``, and those ``clipped``; ``tables``, by name ``rows`` and ``norms``.
    """
    given = run.page.get("rows_clipped")
    if not isinstance(given, dict):
        return None
    frequencies = [int(least) for least in given.get("frequencies") or []]
    present, over = given.get("present") or [], given.get("clipped") or []
    tables = list((given.get("tables") or {}).items())
    names = [name for name, _ in tables[:MOST]]
    rows = []
    for place, least in enumerate(frequencies):
        counts = [_at(about, "rows", place) for _, about in tables[:MOST]]
        steps = number(present[place] if place < len(present) else None) or 0
        if not steps and not any(counts):
            continue
        hit = number(over[place] if place < len(over) else None) or 0
        norms = [_at(about, "norms", place) for _, about in tables[:MOST]]
        cells = [
            (f"{int(count):,}", significant(norm, 3)) if count else ("-", "-")
            for count, norm in zip(counts, norms, strict=True)
        ]
        rows.append(
            {
                "frequency": f"{least:,}" if least == 1 else f"{least:,} to {2 * least - 1:,}",
                "present": f"{int(steps):,}",
                "clipped": percent(hit / steps) if steps else "-",
                "cells": [cell for pair in cells for cell in pair],
            }
        )
    if not rows:
        return None
    return {
        "share": percent(number(given.get("share")) or 0.0),
        "names": [visible(str(name)) for name in names],
        "more": len(tables) - len(names),
        "rows": rows,
        "chart": _over_time(run),
    }


def _at(about: Any, key: str, place: int) -> float:
    found = about.get(key) or [] if isinstance(about, dict) else []
    return (number(found[place]) or 0.0) if place < len(found) else 0.0


def _over_time(run: Run) -> Chart | None:
    """The share of a step's rows that were clipped, of the method that tells one."""
    by_method: dict[str, list[tuple[float, float]]] = {}
    for row in run.train:
        step = number(row.get("step"))
        for name, signals in (row.get("signals") or {}).items():
            share = number(signals.get("clipped")) if isinstance(signals, dict) else None
            if step is not None and share is not None:
                by_method.setdefault(name, []).append((step, 100 * share))
    for series in by_method.values():
        scale, x_name = axis(series[-1][0], "steps")
        high = max(share for _, share in series)
        return chart(
            "clipped",
            [
                Line(points=thin(series), style="c1"),
                Line(points=thin(smooth(series)), style="ink"),
            ],
            title="rows clipped, percent of those in a step",
            description=f"{high:.3g} percent at most",
            y_range=(0.0, max(1.0, 1.05 * high)),
            x_name=x_name,
            x_scale=scale,
        )
    return None
