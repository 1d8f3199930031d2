"""grow: items of folders, JSONL, Parquet and tars into a pool."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sparing.cli.common import Json, app, progress, show, told
from sparing.core.errors import RequestError, RunError

if TYPE_CHECKING:
    from sparing.pool.growth import Growth
    from sparing.pool.sources import Ingested, Source

OPTIONS: Final = "grow.json"
_FORMAT: Final = 1
_USUAL: Final[dict[str, Any]] = {
    "encoder": "pixels",
    "index": "auto",
    "k": 4,
    "published": False,
    "threshold": 0.02,
    "image_hash": 4,
    "misaligned": 0.01,
    "seed": 0,
}
"""Of a new pool; a later command takes what the one before was given."""


@app.command()
def grow(
    store: Annotated[Path, typer.Argument(help="The pool's directory; made if it is not there.")],
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...",
            help="Folders of images, .jsonl, .parquet or .tar files, or folders of these.",
        ),
    ],
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="pixels, minilm, efficientnet-lite0, or a Hugging Face model's directory.",
        ),
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Neighbour search: auto, exact, inverted or graph.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Keep at most so many items, those that cover the rest.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Items of one transaction.")] = 256,
    threshold: Annotated[
        float | None,
        typer.Option(help="Cosine distance up to which items are near copies; -1 for none."),
    ] = None,
    image_hash: Annotated[
        int | None,
        typer.Option(
            metavar="BITS",
            help="Image files are near copies too where so many bits of their perceptual hashes "
            "differ at most; -1 for not.",
        ),
    ] = None,
    misaligned: Annotated[
        float | None,
        typer.Option(help="Share of wrong image-text pairs that may be kept; 0 keeps all pairs."),
    ] = None,
    k: Annotated[int | None, typer.Option(help="Neighbours that a gain is a mean over.")] = None,
    published: Annotated[
        bool | None,
        typer.Option(
            "--published/--expected", help="Gains by the released rule, or free of order."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn.")] = None,
    kind: Annotated[
        str, typer.Option(help="Of the sources: auto, folder, jsonl, parquet or tar.")
    ] = "auto",
    content: Annotated[
        str, typer.Option(help="What each item has: auto, image, text or image-text.")
    ] = "auto",
    labels: Annotated[
        bool, typer.Option("--labels", help="Sub-folders of images are their labels.")
    ] = False,
    classes: Annotated[
        str, typer.Option(metavar="A,B,...", help="Names of classes, where labels are words.")
    ] = "",
    image: Annotated[str | None, typer.Option(help="The column of images.")] = None,
    text: Annotated[str | None, typer.Option(help="The column of texts.")] = None,
    label: Annotated[str | None, typer.Option(help="The column of labels.")] = None,
    key: Annotated[str | None, typer.Option(help="The column of keys.")] = None,
    reread: Annotated[
        bool, typer.Option("--reread", help="Read the sources anew from their start.")
    ] = False,
    drops: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="List every item that is not kept, with why."),
    ] = None,
    report: Annotated[bool, typer.Option(help="Write the page STORE/report.html.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: Json = False,
) -> None:
    """Add what sources hold to a pool: clean it, value it, keep it in a store.

    It may be stopped at any point; the same command goes on from there.
    """
    with told(again="the same command"):
        from sparing.core.checks import require_whole
        from sparing.pool.sources import account, ingest, open_source

        if budget is not None:
            require_whole("--budget", budget, 1)
        require_whole("--batch", batch, 1)
        reading: dict[str, Any] = {
            "content": content,
            "labels": labels,
            "classes": tuple(name.strip() for name in classes.split(",") if name.strip()),
            "image": image,
            "text": text,
            "label": label,
            "key": key,
        }
        opened = [open_source(path, kind=kind, **reading) for path in sources]
        _check_places(store, sources)
        given = {
            "encoder": encoder,
            "index": index,
            "k": k,
            "published": published,
            "threshold": threshold,
            "image_hash": image_hash,
            "misaligned": misaligned,
            "seed": seed,
        }
        options = remembered(store, given)
        with pool_of(store, options) as growth, progress(quiet) as note:

            def moved(source: Source, done: int, found: Ingested) -> None:
                words = f"{found.stored:,} stored, {sum(found.dropped.values()):,} dropped"
                note(source.path.name, done, source.total, words)

            found = ingest(growth, opened, batch=batch, reread=reread, told=moved)
            if not len(growth):
                raise RunError(f"the sources hold nothing, and {store} is empty; check them")
            _remember(store, options)
            evicted = 0
            if budget is not None:
                note("budget", 0, 1)
                evicted = len(growth.evict(budget))
            _snapshot(store, growth, changed=bool(found.stored or evicted))
        _finish(store, found, evicted, drops=drops, report=report, as_json=as_json, account=account)


def _finish(
    store: Path,
    found: Ingested,
    evicted: int,
    *,
    drops: Path | None,
    report: bool,
    as_json: bool,
    account: Any,
) -> None:
    from sparing.cli import pool_page
    from sparing.pool.store import Store

    with Store.open(store) as view:
        told_ = account.summary(view)
        if drops is not None:
            _write_lines(drops, account.dropped(view))
        page = pool_page.write(view, store, told_) if report else None
    value = {
        "store": str(store),
        "now": {**found.to_dict(), "evicted": evicted},
        **told_,
        "drops_file": None if drops is None else str(drops),
        "report": None if page is None else str(page),
    }
    lines = [
        f"now: {found.read:,} items read, {found.stored:,} stored"
        + (f", {evicted:,} evicted" if evicted else ""),
        *words(told_),
    ]
    if drops is not None:
        lines.append(f"what is not kept, one by one: {drops}")
    if page is not None:
        lines.append(f"page: {page}")
    show(value, as_json, lambda: lines)


def words(told_: dict[str, Any]) -> list[str]:
    """A store's summary as lines of a table."""
    rows = [("kept", told_["kept"]), *told_["dropped"].items()]
    whole = max(told_["kept"] + sum(told_["dropped"].values()), 1)
    lines = [f"{told_['stored']:,} items stored, {told_['kept']:,} kept", ""]
    lines.append(f"{'reason':<16}{'items':>12}{'share':>9}")
    lines += [f"{name:<16}{n:>12,}{n / whole:>9.1%}" for name, n in rows]
    twice = told_["same_key_other_content"]
    if twice:
        lines += ["", f"{twice:,} stored items have a key that their source used before"]
    lines += ["", f"{'tenth':<8}{'items':>10}{'kept':>10}{'mean gain':>12}"]
    for number, tenth in enumerate(told_["tenths"], start=1):
        gain = "" if tenth["gain"] is None else f"{tenth['gain']:.4f}"
        lines.append(f"{number:<8}{tenth['items']:>10,}{tenth['kept']:>10,}{gain:>12}")
    return [*lines, ""]


def pool_of(store: Path, options: dict[str, Any]) -> Growth:
    """The pool with the options of ``remembered``."""
    from sparing.pool.cleaning import Cleaning
    from sparing.pool.growth import Growth

    clean = Cleaning(
        copies=options["threshold"],
        image_hash=options["image_hash"],
        misaligned=options["misaligned"],
    )
    return Growth(
        store,
        encoder=options["encoder"],
        index=options["index"],
        k=options["k"],
        published=options["published"],
        clean=clean,
        seed=options["seed"],
    )


def _snapshot(store: Path, growth: Growth, *, changed: bool) -> None:
    """Keep the gains with a snapshot, also where a run was killed before it made one."""
    from sparing.pool.store import Store

    with Store.open(store) as view:
        made = view.snapshots()
    if changed or not made or made[-1].size != len(growth):
        growth.snapshot("sparing grow")


def _check_places(store: Path, sources: list[Path]) -> None:
    if store.exists() and not store.is_dir():
        raise RequestError(f"{store} is a file; the pool needs a directory, given before sources")
    for path in sources:
        if path.resolve().is_relative_to(store.resolve()):
            raise RequestError(f"the source {path} lies in the pool {store}; give another place")


def remembered(store: Path, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is given, else what the pool was grown with before, else the usual."""
    from sparing.pool.encoders import NAMES

    given = dict.fromkeys(_USUAL) if given is None else given
    known: dict[str, Any] = {}
    if (store / OPTIONS).is_file():
        try:
            known = json.loads((store / OPTIONS).read_text(encoding="utf-8"))
            if known["format"] > _FORMAT:
                raise RunError(
                    f"{store / OPTIONS} was written by a newer version of sparing; upgrade with "
                    f'"pip install --upgrade sparing"'
                )
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{store / OPTIONS} is damaged ({error}); delete it, and give the options again"
            ) from error
    options: dict[str, Any] = {
        name: given[name] if given[name] is not None else known.get(name, usual)
        for name, usual in _USUAL.items()
    }
    if options["published"] and given["threshold"] is None and "threshold" not in known:
        options["threshold"] = -1.0  # the released rule takes no copies out
    if options["encoder"] not in NAMES and Path(options["encoder"]).is_dir():
        options["encoder"] = str(Path(options["encoder"]).resolve())
    return options


def _remember(store: Path, options: dict[str, Any]) -> None:
    from sparing.core.state import atomic_write_json

    atomic_write_json(store / OPTIONS, {"format": _FORMAT, **options})


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    from sparing.core.state import atomic_write_text

    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
