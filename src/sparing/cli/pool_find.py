"""pool find: items whose label is likely wrong, or that are far from all others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, final

import numpy as np
import typer

from sparing.cli.common import Json, show, told
from sparing.cli.grow import OPTIONS, pool_of, remembered
from sparing.cli.pool import At, pool
from sparing.core.errors import RequestError, unknown

if TYPE_CHECKING:
    from sparing.pool.decisions import Decision
    from sparing.pool.growth import Growth
    from sparing.pool.items import Item, Vectors

KINDS: Final = {"label-issues": "label issue", "outliers": "outlier"}
"""By what a user asks for: the reason that such items get."""


@pool.command()
def find(
    store: At,
    kind: Annotated[str, typer.Option(help="What to look for: label-issues or outliers.")],
    apply: Annotated[
        bool, typer.Option("--apply", help="Leave what is found out of the choice.")
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Take in again what was left out for this reason.")
    ] = False,
    rule: Annotated[
        str | None,
        typer.Option(help="Of label issues: cleanlab's rule, prune_by_noise_rate if not given."),
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option(help="Of outliers: robust standard deviations above the median, 6."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List items that are likely labelled wrongly, or far from everything else, with examples.

    Nothing is changed without --apply, and --undo takes that back.
    """
    with told(again="the same command"):
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
        if apply and undo:
            raise RequestError("--apply and --undo exclude each other; give one of them")
        options = _options(kind, undo, rule, factor)
        with _opened(store) as growth:
            if undo:
                decision = _applied(growth, KINDS[kind])
                growth.undo(decision)
            else:
                decision = growth.find(KINDS[kind], **options)  # type: ignore[arg-type]
                if apply:
                    growth.apply(decision)
            if (apply or undo) and decision.ids.size:
                growth.snapshot(f"sparing pool find --kind {kind} --{'undo' if undo else 'apply'}")
            kept = len(growth.kept())
            value = {"store": str(store), "kind": kind, **_value(store, growth, decision)}
        value |= {"applied": apply, "undone": undo, "kept": kept}
        if apply or undo:
            _page(store)
        show(value, as_json, lambda: _lines(value))


def _options(kind: str, undo: bool, rule: str | None, factor: float | None) -> dict[str, Any]:
    given = {"rule": rule, "factor": factor}
    belongs = {"rule": "label-issues", "factor": "outliers"}
    for name, value in given.items():
        if value is not None and (undo or belongs[name] != kind):
            what = "--undo" if undo else f"--kind {kind}"
            raise RequestError(f"--{name} says nothing with {what}; leave it out")
    return {name: value for name, value in given.items() if value is not None}


def _opened(store: Path) -> Growth:
    """The pool as it was grown; nothing is encoded, so its encoder is not needed."""
    from sparing.pool import resuming
    from sparing.pool.store import Store

    with Store.open(store) as view:
        settings = view.settings
    options = remembered(store)
    if not (store / OPTIONS).is_file():
        saved = resuming.settings(store)
        if saved is None:
            raise RequestError(
                f"{store} does not tell how it was grown; open it in Python as it was made, and "
                "use find, apply and undo of sparing.Growth"
            )
        names = {"threshold": "copies", "image_hash": "bits", "k": "k", "published": "published"}
        options |= {name: saved[key] for name, key in names.items()}
    return pool_of(store, {**options, "encoder": _Known(settings)})


def _applied(growth: Growth, reason: str) -> Decision:
    """The decision that what has this reason now came by."""
    from sparing.pool.decisions import Decision
    from sparing.pool.items import REASONS

    ids = growth.ids[growth.reasons == REASONS.index(reason)]
    return Decision(
        reason=reason, ids=ids, before=np.zeros(ids.size, np.int64), detail="taken in again"
    )


def _value(store: Path, growth: Growth, decision: Decision) -> dict[str, Any]:
    from sparing.pool.store import Store

    shown = growth.items([example.id for example in decision.examples])
    every = decision.ids.tolist()
    with Store.open(store) as view:
        keys = view.column("key")[view.positions(decision.ids)].tolist()
    return {
        "reason": decision.reason,
        "rule": decision.detail,
        "found": len(every),
        "items": [{"id": i, "key": str(key)} for i, key in zip(every, keys, strict=True)],
        "examples": [
            {"id": example.id, "key": item.key, "text": item.text, "why": example.detail}
            for example, item in zip(decision.examples, shown, strict=True)
        ],
    }


def _lines(value: dict[str, Any]) -> list[str]:
    found = value["found"]
    lines = [f"{found:,} items, {value['reason']}: {value['rule']}"]
    if value["examples"]:
        lines += ["", f"{'id':>10}  {'key':<32}  why"]
    for example in value["examples"]:
        lines.append(f"{example['id']:>10}  {_cut(example['key']):<32}  {example['why']}")
    lines.append("")
    if value["undone"]:
        lines.append(f"taken in again; {value['kept']:,} items are kept now")
    elif value["applied"]:
        lines.append(f"left out; {value['kept']:,} items are kept now, and --undo takes it back")
    else:
        lines.append("nothing was changed; --apply leaves them out, --json lists all of them")
    return lines


def _cut(key: str) -> str:
    return key if len(key) <= 32 else f"...{key[-29:]}"


def _page(store: Path) -> None:
    from sparing.cli import pool_page
    from sparing.pool.sources import account
    from sparing.pool.store import Store

    with Store.open(store) as view:
        pool_page.write(view, store, account.summary(view))


@final
class _Known:
    """In the place of the encoder that a pool was made with, where nothing is to be encoded."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.dim, self.version = int(settings["dim"]), str(settings["encoder"])

    def __call__(self, items: Sequence[Item]) -> Vectors:
        raise AssertionError("nothing is encoded here")
