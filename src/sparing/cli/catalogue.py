"""ls, card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparing.cli.common import Json, app, show, told
from sparing.core.errors import RequestError


@app.command()
def ls(as_json: Json = False) -> None:
    """List recipes, methods and tasks."""
    with told():
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
            said = []
            for title, entries in found.items():
                said.append(title)
                for entry in entries:
                    paper = f" ({entry['paper']})" if entry.get("paper") else ""
                    said.append(f"  {entry['name']:<18} {entry['about']}{paper}")
            return said

        show(found, as_json, lines)


@app.command()
def card(
    name: Annotated[str, typer.Argument(help="A method's name (sparing ls).")],
    as_json: Json = False,
) -> None:
    """Print a method's card: what it does, when to use it, what it costs, what we measured."""
    with told():
        from sparing.core import registry

        record = registry.method_record(name)
        text = _card(record.card or record.name)
        found = {"name": record.name, "class": record.class_name, "paper": record.paper}
        if as_json or not sys.stdout.isatty():
            show({**found, "card": text}, as_json, lambda: [text])
        else:
            from rich.console import Console
            from rich.markdown import Markdown

            Console().print(Markdown(text))


def _card(name: str) -> str:
    """A card's text: installed beside the package, or in docs/ of a source checkout."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "cards", here.parents[1] / "docs" / "methods"):
        file = folder / f"{name}.md"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise RequestError(f'the card "{name}" is missing from this installation; reinstall sparing')
