"""The page of one run: gathers what the sections show and writes ``report.html``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from sparing.core.state import atomic_write_text
from sparing.run.report import (
    chosen,
    clipped,
    curves,
    further,
    grown,
    headline,
    kept,
    layers,
    mixture,
    passages,
    recovery,
    tables,
    words,
)
from sparing.run.report.read import Run, number, read
from sparing.run.report.render import render

PAGE: Final = "report.html"


def write(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir`` from what the run left there; the same input gives
    the same page. A run that was killed, or has no methods or domains, gets a page that says so.

    Raises:
        RequestError: ``run_dir`` holds no run, or jinja2 is not installed.
    """
    run = read(Path(run_dir))
    command, note = _command(run)
    no_experts = "Nothing about experts was recorded."
    if run.summary and not run.summary.get("methods"):
        no_experts = "No method was attached: every parameter worked on every token."
    page = render(
        "page.html.j2",
        run=run,
        title=f"{run.name}: {headline.verdict(run)[0]}",
        verdict=headline.verdict(run),
        lead=headline.lead(run),
        status=headline.status(run),
        figures=headline.figures(run),
        references=bool(run.references),
        losses=curves.loss_charts(run),
        metric=words.metric_name(run.metric),
        domains=tables.by_domain(run),
        good=("+" if run.higher_is_better else words.MINUS) + f"8{words.THIN}%",
        has_evals=bool(run.evals),
        ledger=tables.ledger(run),
        layers=layers.cards(run),
        heat=layers.heat(run),
        bytes=passages.coloured(run),
        no_experts=no_experts,
        samples=passages.samples(run),
        chosen=chosen.chosen(run),
        pictures=chosen.pictures(run),
        further=further.charts(run),
        tables=further.tables(run),
        kept=kept.kept(run),
        clipped=clipped.clipped(run),
        mixture=mixture.mixture(run),
        grown=grown.grown(run),
        recovery=recovery.recovery(run),
        domain_name=run.domain_name,
        command=command,
        command_note=note,
        facts=_facts(run),
        events=_events(run),
        signals=_flat(run.summary.get("methods") or {}),
    )
    path = Path(run_dir) / PAGE
    atomic_write_text(path, page)
    return path


def _command(run: Run) -> tuple[str, str]:
    recorded = run.page.get("command") or run.summary.get("command")
    if isinstance(recorded, list):
        recorded = " ".join(map(str, recorded))
    if recorded:
        return words.visible(str(recorded)), ""
    return "sparing run recipe.yaml", "The command was not recorded; this runs the same recipe."


def _facts(run: Run) -> list[tuple[str, str]]:
    environment = run.summary.get("environment") or {}
    found = [(words.metric_name(name.removeprefix("packages.")), value)
             for name, value in _flat(environment)]  # fmt: skip
    precision = (run.summary.get("precision") or {}).get("chosen")
    if precision:
        found.append(("precision", str(precision)))
    if "seed" in run.summary:
        found.append(("seed", str(run.summary["seed"])))
    for key, name in (("code", "hash of the code"), ("corpus", "hash of the data")):
        if run.summary.get(key):
            found.append((name, str(run.summary[key])))
    return found


def _events(run: Run) -> list[dict[str, str]]:
    found = []
    for row in run.events:
        where = words.layer_name(str(row["layer"])) if row.get("layer") is not None else ""
        if row.get("expert") is not None:
            where += f"{', ' * bool(where)}expert {row['expert']}"
        found.append(
            {
                "step": f"{row['step']:,}",
                "event": row["event"],
                "where": where,
                "why": str(row.get("why") or ""),
            }
        )
    return found


def _flat(tree: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested signals as (dotted name, value) in order."""
    if isinstance(tree, dict):
        inner = ((f"{name}.{key}" if name else str(key), value) for key, value in tree.items())
        return [pair for key, value in inner for pair in _flat(value, key)]
    if isinstance(tree, list):
        return [(name, ", ".join(words.significant(v, 4) if number(v) is not None else str(v)
                                 for v in tree))]  # fmt: skip
    return [(name, words.significant(tree, 4) if number(tree) is not None else str(tree))]
