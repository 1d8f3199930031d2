"""The command line: plan, run, report, ls, card. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sparing.core.errors import RequestError, SparingError

app = typer.Typer(
    name="sparing",
    help="Train PyTorch models for less, with an account of what was saved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Name = Annotated[str, typer.Argument(help="A recipe's name (sparing ls) or a YAML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a key of the recipe."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


@contextmanager
def _told() -> Iterator[None]:
    """Errors that are ours end in one message and the exit code of their kind."""
    try:
        yield
    except SparingError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; go on with the same command and --resume", err=True)
        raise typer.Exit(1) from None


def _show(value: Any, as_json: bool, lines: Callable[[], list[str]]) -> None:
    typer.echo(json.dumps(value, indent=1) if as_json else "\n".join(lines()))


@app.command("run")
def run_(
    recipe: Name,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/RECIPE.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the unfinished run in OUT.")] = False,
    quiet: Annotated[bool, typer.Option(help="Show no progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe and leave a run directory with a page to look at."""
    with _told():
        from sparing.run.directory import free_path, unfinished_path
        from sparing.run.progress import display
        from sparing.run.recipe import load
        from sparing.run.runner import run

        wanted = load(recipe, set_ or [])
        base = Path("runs") / wanted.name
        where = out or (unfinished_path(base) if resume else free_path(base))
        command = shlex.join(["sparing", *sys.argv[1:]])
        summary = run(wanted, where, resume=resume, display=display(quiet), command=command)
        _show(summary, as_json, lambda: _summary_lines(summary, where))


@app.command()
def plan(recipe: Name, set_: Set = None, as_json: Json = False) -> None:
    """Tell what every method would touch and what it would cost; spends nothing."""
    with _told():
        from sparing.run.plan import lines
        from sparing.run.plan import plan as planned
        from sparing.run.recipe import load

        found = planned(load(recipe, set_ or []))
        _show(found, as_json, lambda: lines(found))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run directories.")],
    as_json: Json = False,
) -> None:
    """Write the page of a run; of several, one page that lists them too."""
    with _told():
        from sparing.run import report as pages

        made = (
            pages.write(directories[0]) if len(directories) == 1 else pages.write_many(directories)
        )
        _show({"page": str(made)}, as_json, lambda: [str(made)])


@app.command()
def ls(as_json: Json = False) -> None:
    """List recipes, methods and tasks."""
    with _told():
        from sparing.core import registry
        from sparing.run.recipe import available

        recipes = [{"name": name, "about": about} for name, about in available().items()]
        methods = [
            {"name": r.name, "class": r.class_name, "about": r.summary, "paper": r.paper}
            for r in registry.methods()
        ]
        tasks = [{"name": r.name, "about": r.summary} for r in registry.tasks()]
        found = {"recipes": recipes, "methods": methods, "tasks": tasks}

        def lines() -> list[str]:
            told = []
            for title, entries in found.items():
                told.append(title)
                for entry in entries:
                    paper = f" ({entry['paper']})" if entry.get("paper") else ""
                    told.append(f"  {entry['name']:<18} {entry['about']}{paper}")
            return told

        _show(found, as_json, lines)


@app.command()
def card(
    name: Annotated[str, typer.Argument(help="A method's name (sparing ls).")],
    as_json: Json = False,
) -> None:
    """Print a method's card: what it does, when to use it, what it costs, what we measured."""
    with _told():
        from sparing.core import registry

        record = registry.method_record(name)
        text = _card(record.card or record.name)
        found = {"name": record.name, "class": record.class_name, "paper": record.paper}
        if as_json or not sys.stdout.isatty():
            _show({**found, "card": text}, as_json, lambda: [text])
        else:
            from rich.console import Console
            from rich.markdown import Markdown

            Console().print(Markdown(text))


def _card(name: str) -> str:
    """A card's text: installed beside the package, or in docs/ of a source checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "cards", here.parents[1] / "docs" / "methods"):
        file = folder / f"{name}.md"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise RequestError(f'the card "{name}" is missing from this installation; reinstall sparing')


def _summary_lines(summary: dict[str, Any], where: Path) -> list[str]:
    from sparing.core.ledger import Ledger

    metric = summary["metric"]
    ledger = Ledger()
    ledger.load_state_dict(summary["ledger"])
    told = [
        f"{metric['name']} {metric['value']:.4f} after {summary['tokens']:,} tokens "
        f"in {summary['seconds']:.0f} s"
    ]
    told += [f"  {row}" for row in ledger.rows()]
    page = where / "report.html"
    told.append(f"page: {page}" if page.is_file() else f"run directory: {where}")
    return told


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
