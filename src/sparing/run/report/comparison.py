"""The page of a comparison: quality and cost, differences, curves, every run, commands."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sparing.core.state import atomic_write_text
from sparing.run.report import scatter, words
from sparing.run.report.arms import differences, rows, seeds_of, settings
from sparing.run.report.learned import learned
from sparing.run.report.render import render
from sparing.run.report.scatter import Point, Scatter
from sparing.run.report.tables import UNIT_NAMES, UNITS

if TYPE_CHECKING:
    from sparing.run.compare.finished import Comparison

SCRIPT: Final = (
    'const s=document.getElementById("axis");s.parentNode.hidden=false;'
    's.onchange=()=>document.querySelectorAll("[data-axis]").forEach('
    "f=>f.hidden=f.dataset.axis!==s.value)"
)
"""Shows the plot of the chosen axis; without it the page shows the first one."""
AXES: Final = ("flops", "seconds", *(unit for unit in UNITS if unit != "flops"), "stored")
NAMES: Final = {**UNIT_NAMES, "seconds": "time", "stored": "files of the trained model"}


def write(comparison: Comparison, path: Path) -> Path:
    """Write the page to ``path``; the same comparison gives the same page.

    Raises:
        RequestError: jinja2 is not installed, or a run's files cannot be read.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    metric = words.metric_name(comparison.metric)
    title, remark = headline(comparison)
    about = comparison.about
    charts, about_charts = learned(comparison)
    page = render(
        "compare.html.j2",
        title=title,
        remark=remark,
        c=comparison,
        metric=metric,
        better="higher" if comparison.higher_is_better else "lower",
        recipe=str(about.get("recipe") or comparison.task),
        about=str(about.get("about") or ""),
        script=SCRIPT,
        script_hash=f"sha256-{digest}",
        plots=plots(comparison),
        differences=differences(comparison),
        charts=charts,
        about_charts=about_charts,
        rows=rows(comparison, path.parent),
        seeds=seeds_of(comparison),
        settings=settings(comparison),
        command=str(about.get("command") or ""),
        facts=_facts(comparison),
        warnings=comparison.warnings,
        missing=comparison.missing,
    )
    atomic_write_text(path, page)
    return path


def headline(comparison: Comparison) -> tuple[str, str]:
    """The verdicts in a few words, and what they were judged by."""
    counts: dict[str, list[str]] = {}
    for arm in comparison.arms:
        if arm.name != comparison.baseline:
            reached = arm.judgement.verdict if arm.judgement else None
            counts.setdefault(reached or "without a verdict", []).append(arm.name)
    order = ("equivalent", "different", "undecided", "without a verdict")
    seeds = max((len(arm.finished) for arm in comparison.arms), default=0)
    remark = (
        f"against {comparison.baseline}, margin {comparison.margin}".replace("_", " ")
        + f", {seeds} seed{'s' * (seeds != 1)}"
    )
    if sum(map(len, counts.values())) == 1:
        (verdict, names), *_ = counts.items()
        linked = {
            "equivalent": f"is equivalent to {comparison.baseline}",
            "different": f"differs from {comparison.baseline}",
            "undecided": "is undecided",
        }
        return f"{names[0]} {linked.get(verdict, 'has no verdict')}", remark
    parts = [f"{len(counts[v])} {v}" for v in order if v in counts]
    return words.listing(parts).capitalize() or "Nothing to compare", remark


def plots(comparison: Comparison) -> list[Scatter]:
    """One plot for each axis of cost that at least one arm has."""
    found = []
    for unit in AXES:
        points = []
        for number, arm in enumerate(comparison.arms, start=1):
            if arm.mean is None or unit not in arm.costs:
                continue
            seeds = [(run.cost(unit) or 0.0, run.value) for run in arm.finished]
            mean = (arm.costs[unit], arm.mean)
            points.append(Point(number=number, name=arm.name, mean=mean, seeds=seeds))
        title = NAMES.get(unit, words.metric_name(unit))
        drawn = scatter.scatter(
            f"cost-{unit}",
            unit,
            title,
            points,
            metric=words.metric_name(comparison.metric),
            higher=comparison.higher_is_better,
        )
        found += [drawn] if drawn else []
    return found


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    runs = [run for arm in comparison.arms for run in arm.finished]
    found: list[tuple[str, str]] = []
    for key in ("device", "threads", "python", "torch", "system"):
        values = {str((run.summary.get("environment") or {}).get(key, "")) for run in runs} - {""}
        if values:
            found.append((key, ", ".join(sorted(values))))
    precisions = {str((run.summary.get("precision") or {}).get("chosen", "")) for run in runs}
    found.append(("precision", ", ".join(sorted(precisions - {""})) or words.DASH))
    seconds = sum(run.cost("seconds") or 0.0 for run in runs)
    found.append(("time of all runs", words.duration(seconds)))
    if comparison.code:
        found.append(("hash of the code", comparison.code))
    if comparison.corpus:
        found.append(("hash of the data", comparison.corpus))
    return found
