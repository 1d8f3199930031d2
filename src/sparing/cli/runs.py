"""run, plan, report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparing.cli.common import Json, Name, Preset, Set, app, show, told


@app.command("run")
def run_(
    recipe: Name,
    set_: Set = None,
    preset: Preset = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/RECIPE.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the unfinished run in OUT.")] = False,
    quiet: Annotated[bool, typer.Option(help="Show no progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe and leave a run directory with a page to look at."""
    with told():
        from sparing.run.directory import free_path, unfinished_path
        from sparing.run.progress import display
        from sparing.run.recipe import load
        from sparing.run.runner import run

        wanted = load(recipe, set_ or [], preset=preset)
        base = Path("runs") / wanted.name
        where = out or (unfinished_path(base) if resume else free_path(base))
        command = shlex.join(["sparing", *sys.argv[1:]])
        summary = run(wanted, where, resume=resume, display=display(quiet), command=command)
        show(summary, as_json, lambda: _summary_lines(summary, where))


@app.command()
def plan(recipe: Name, set_: Set = None, preset: Preset = None, as_json: Json = False) -> None:
    """Tell what every method would touch and what it would cost; times a few steps."""
    with told():
        from sparing.run.estimate import seconds
        from sparing.run.plan import lines
        from sparing.run.plan import plan as planned
        from sparing.run.recipe import load

        wanted = load(recipe, set_ or [], preset=preset)
        found = planned(wanted)
        found["seconds"] = seconds(wanted)
        show(found, as_json, lambda: lines(found))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run directories.")],
    as_json: Json = False,
) -> None:
    """Write the page of a run; of several, one page that lists them too."""
    with told():
        from sparing.run import report as pages

        made = (
            pages.write(directories[0]) if len(directories) == 1 else pages.write_many(directories)
        )
        show({"page": str(made)}, as_json, lambda: [str(made)])


def _summary_lines(summary: dict[str, Any], where: Path) -> list[str]:
    from sparing.core.ledger import Ledger

    metric = summary["metric"]
    ledger = Ledger()
    ledger.load_state_dict(summary["ledger"])
    entries = summary["ledger"]
    no_text = entries.get("tokens") == entries.get("samples")  # then both say the same
    unit = "samples" if no_text else "tokens"
    said = [
        f"{metric['name']} {metric['value']:.4f} after {summary['tokens']:,} {unit} "
        f"in {summary['seconds']:.0f} s"
    ]
    said += [f"  {row}" for row in ledger.rows() if not (no_text and row.unit == "tokens")]
    page = where / "report.html"
    said.append(f"page: {page}" if page.is_file() else f"run directory: {where}")
    return said
