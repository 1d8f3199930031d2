"""compare: matched arms of a recipe, their differences, and a verdict."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparing.cli.common import Json, Name, Preset, Set, app, show, told
from sparing.core.errors import RequestError, RunError


@app.command()
def compare(
    recipe: Name,
    seeds: Annotated[int, typer.Option(help="Runs of each arm: seeds 0, 1, ...")] = 3,
    arms: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these arms, the baseline among them.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The arm to compare with.")] = None,
    margin: Annotated[
        str | None,
        typer.Option(help='A difference that would not matter, such as "+-0.02 bits_per_byte".'),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="30m", help="Start no run that ends after this time.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in its own process.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of each run.")] = None,
    preset: Preset = None,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the runs go; default runs/compare-RECIPE.")
    ] = None,
    looks: Annotated[
        int, typer.Option(help="Blocks of seeds after each of which a verdict may end it.")
    ] = 1,
    level: Annotated[float, typer.Option(help="Of the intervals, over all looks.")] = 0.95,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write all of it as JSON there.")
    ] = None,
    quiet: Annotated[bool, typer.Option(help="Show no progress.")] = False,
    as_json: Json = False,
) -> None:
    """Run matched arms on the same seeds and test whether anything was lost.

    Finished runs are kept and unfinished ones resumed: the same command goes on after any end.
    """
    with told(again="the same command"):
        from sparing.run.compare.arms import Asked
        from sparing.run.compare.record import write
        from sparing.run.compare.run import PAGE, run_comparison
        from sparing.run.compare.told import lines
        from sparing.run.recipe import load

        name = load(recipe, set_ or [], preset=preset).name
        where = out or Path("runs") / "-".join(["compare", name, *([preset] if preset else [])])
        asked = Asked(
            recipe=recipe,
            out=where,
            seeds=seeds,
            arms=None if arms is None else _names(arms),
            baseline=baseline,
            margin=margin,
            budget=None if budget is None else _minutes(budget),
            jobs=jobs,
            threads=threads,
            preset=preset,
            overrides=tuple(set_ or ()),
            looks=looks,
            level=level,
            command=shlex.join(["sparing", *sys.argv[1:]]),
        )
        found = run_comparison(
            asked, note=lambda text: None if quiet else typer.echo(text, err=True)
        )
        if record is not None:
            write(record, found)
        page = where / PAGE

        def said() -> list[str]:
            return [*lines(found), f"page: {page}" if page.is_file() else f"runs: {where}"]

        show(found.to_dict(), as_json, said)
        if found.about.get("failed"):
            raise RunError("; ".join(found.about["failed"]))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RequestError("--arms names no arm; give their names with commas between")
    return names


def _minutes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)", text.strip())
    if found is None:
        raise RequestError(f'--budget "{text}" is no time; write 90s, 30m or 1.5h')
    return float(found[1]) * {"s": 1 / 60, "m": 1.0, "min": 1.0, "h": 60.0}[found[2]]
