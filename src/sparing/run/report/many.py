"""A page that lists several runs, those on the same data together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sparing.core.errors import RequestError
from sparing.core.state import atomic_write_text
from sparing.run.report import curves, headline, words
from sparing.run.report.one import write
from sparing.run.report.read import Run, number, read
from sparing.run.report.render import render

MANY: Final = "runs.html"


def write_many(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page that lists several runs, and each run's own page beside it.

    Runs on different data or of different metrics stand in groups of their own. ``out`` is
    ``runs.html`` in the directory that all have in common where it is None.

    Raises:
        RequestError: no directory was given, or one of them holds no run.
    """
    if not run_dirs:
        raise RequestError("no run directory was given; name at least one that `sparing run` wrote")
    dirs = [Path(d).resolve() for d in run_dirs]
    runs = [read(d) for d in dirs]
    pages = [write(d) for d in dirs]
    out = Path(out) if out else Path(os.path.commonpath([d.parent for d in dirs])) / MANY
    groups: dict[tuple[str, str, str], list[tuple[Run, str]]] = {}
    for run, page in zip(runs, pages, strict=True):
        corpus = str(run.summary.get("corpus") or "")
        key = (str(run.summary.get("task") or "unfinished"), run.metric, corpus)
        link = Path(os.path.relpath(page, out.resolve().parent)).as_posix()
        groups.setdefault(key, []).append((run, link))
    page_text = render(
        "many.html.j2", total=len(runs), groups=[_group(*k, v) for k, v in groups.items()]
    )
    atomic_write_text(out, page_text)
    return out


def _group(task: str, metric: str, corpus: str, members: list[tuple[Run, str]]) -> dict[str, Any]:
    names = sorted({name for run, _ in members for name in headline.mean_references(run)})
    rows = []
    for run, link in members:
        means, tokens, flops = headline.mean_references(run), run.ledger("tokens"), None
        flops = run.ledger("flops")
        seconds, value = number(run.summary.get("seconds")), run.value
        sign = -1 if run.higher_is_better else 1
        compared = []
        for name in names:
            if value is None or not means.get(name):
                compared.append((False, words.DASH))
                continue
            change = value / means[name] - 1
            compared.append((sign * change < 0, "+" * (change > 0) + words.percent(change)))
        rows.append(
            {
                "name": run.name,
                "link": link,
                "value": words.DASH if value is None else f"{value:.3f}",
                "references": compared,
                "tokens": words.count(tokens[0]) if tokens else words.DASH,
                "flops": words.amount(flops[0], "flops") if flops else words.DASH,
                "share": words.percent(flops[0] / flops[1]) if flops and flops[1] else words.DASH,
                "time": words.DASH if seconds is None else words.duration(seconds),
                "seed": run.summary.get("seed", words.DASH),
            }
        )
    return {
        "task": task,
        "metric": words.metric_name(metric),
        "corpus": f"data {corpus[:12]}" if corpus else "",
        "names": names,
        "rows": rows,
        "charts": curves.overlay([run for run, _ in members]),
    }
