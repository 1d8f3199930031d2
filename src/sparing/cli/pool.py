"""pool check, compact, backup and show: what can be done with a store as it is."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from sparing.cli.common import Json, app, show, told
from sparing.cli.grow import OPTIONS, words

pool = typer.Typer(
    help="Look at a pool, check, compact and back it up.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(pool, name="pool")

At = Annotated[Path, typer.Argument(help="A pool's directory.")]


@pool.command()
def check(store: At, as_json: Json = False) -> None:
    """Read every byte and compare it with its checksum; exit code 1 where something is wrong."""
    with told():
        from sparing.pool.store import check as look

        problems = look(store)
        value = {"store": str(store), "sound": not problems, "problems": problems}
        show(value, as_json, lambda: problems or [f"{store} is sound"])
        if problems:
            raise typer.Exit(1)


@pool.command()
def compact(store: At, as_json: Json = False) -> None:
    """Merge what is small, and give space back to the disk."""
    with told(again="the same command"):
        from sparing.pool.store import compact as merge

        freed = merge(store)
        show({"store": str(store), "freed": freed}, as_json, lambda: [_freed(store, freed)])


@pool.command()
def backup(
    store: At,
    out: Annotated[Path, typer.Argument(help="The copy's directory, not there yet.")],
    as_json: Json = False,
) -> None:
    """Copy a pool as of now, also while another process writes to it."""
    with told(again="the same command"):
        from sparing.core.state import atomic_write_text
        from sparing.pool.store import backup as copy

        copy(store, out)
        if (store / OPTIONS).is_file():
            atomic_write_text(out / OPTIONS, (store / OPTIONS).read_text(encoding="utf-8"))
        show({"store": str(store), "out": str(out)}, as_json, lambda: [f"written: {out}"])


@pool.command("show")
def show_(store: At, as_json: Json = False) -> None:
    """Tell what a pool holds: items by reason, gains, sources, snapshots."""
    with told():
        from sparing.pool.sources import account
        from sparing.pool.store import Store

        with Store.open(store) as view:
            found = account.summary(view)
        show({"store": str(store), **found}, as_json, lambda: _lines(store, found))


def _lines(store: Path, found: dict[str, Any]) -> list[str]:
    lines = [f"{store}: vectors of {found['dim']} by {found['encoder'] or 'an unnamed encoder'}"]
    lines += words(found)
    lines += [f"{s['items']:>12,}  {s['name']}" for s in found["sources"]]
    if found["snapshots"]:
        lines.append("")
    for s in found["snapshots"]:
        when = datetime.fromtimestamp(s["at"], UTC).strftime("%Y-%m-%d %H:%M UTC")
        lines.append(f"snapshot {s['number']}: {s['items']:,} items, {when}, {s['label']}")
    return lines


def _freed(store: Path, freed: int) -> str:
    return f"{store}: {freed:,} bytes given back" if freed > 0 else f"{store} was compact already"
