"""What all commands share: the application, common options, errors, output."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer

from sparing.core.errors import SparingError

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
Preset = Annotated[
    str | None, typer.Option(metavar="NAME", help="One of the recipe's named sets of overrides.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


@contextmanager
def told(again: str = "the same command and --resume") -> Iterator[None]:
    """Errors that are ours end in one message and the exit code of their kind."""
    try:
        yield
    except SparingError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo(f"interrupted; go on with {again}", err=True)
        raise typer.Exit(1) from None


def show(value: Any, as_json: bool, lines: Callable[[], list[str]]) -> None:
    """Print the value as JSON, or its lines."""
    typer.echo(json.dumps(value, indent=1) if as_json else "\n".join(lines()))


def one_place() -> bool:
    """Whether stdout and stderr go to the same terminal or file, where a reader sees both."""
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno()))
    except (OSError, ValueError):  # no files at all, as under a test's capture
        return False


PLAIN_SECONDS = 10.0
"""Seconds between two plain lines of one stage."""


class Note(Protocol):
    """Tells of progress: the stage, how much of how much is done, and more in words."""

    def __call__(self, stage: str, done: int, total: int, words: str = "", /) -> None:
        """``words``: shown beside the bar, or in the line."""


@contextmanager
def progress(quiet: bool) -> Iterator[Note]:
    """What to tell of progress: a bar on a terminal, else plain lines; on stderr."""
    if quiet:
        yield lambda stage, done, total, words="": None
        return
    if not sys.stderr.isatty():
        stages: dict[str, float] = {}

        def line(stage: str, done: int, total: int, words: str = "", /) -> None:
            now = time.monotonic()
            if stage not in stages:
                typer.echo(f"{stage} ...", err=True)
            elif now - stages[stage] < PLAIN_SECONDS:
                return
            else:
                told = f", {words}" if words else ""
                typer.echo(f"{stage}: {done / max(total, 1):.0%}{told}", err=True)
            stages[stage] = now

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}", markup=False),
        console=Console(stderr=True),
    )
    with bar:
        tasks: dict[str, Any] = {}

        def move(stage: str, done: int, total: int, words: str = "", /) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, words="")
            bar.update(tasks[stage], completed=done, words=words)

        yield move
