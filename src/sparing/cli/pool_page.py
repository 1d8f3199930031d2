"""The page of a pool: what is kept and why the rest is not, with examples."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sparing.cli.pool_pictures import copies, coverage
from sparing.core.errors import RequestError
from sparing.core.state import atomic_write_text
from sparing.pool.items import REASONS, Item
from sparing.pool.resuming import PAGE
from sparing.pool.sources.account import GAIN

if TYPE_CHECKING:
    from sparing.pool.store.view import Reading as AnyView

_EXAMPLES: Final = 8
_SIDE: Final = 112
_WORDS: Final = 280
_MEANING: Final = {
    "kept": "in the choice",
    "same content": "the very same content is stored; not stored again",
    "near copy": "another item stands for its group of near copies",
    "misaligned": "image and text do not belong together",
    "label issue": "another label is likelier",
    "outlier": "far from everything",
    "unreadable": "damaged, oversized or empty; not stored",
    "evicted": "left out by the budget",
}


def write(view: AnyView, store: Path, summary: dict[str, Any]) -> Path | None:
    """Write STORE/report.html; None, and nothing, where jinja2 is not installed."""
    from sparing.run.report.render import render

    try:
        page = render("pool.html.j2", **collected(view, store, summary))
    except RequestError:
        return None
    atomic_write_text(store / PAGE, page)
    return store / PAGE


def collected(view: AnyView, store: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """What the page shows. Pictures are small PNGs drawn anew, never the files' own bytes."""
    counts = {"kept": summary["kept"], **summary["dropped"]}
    whole = max(sum(counts.values()), 1)
    words, groups = copies(view)
    highest = max((t["gain"] or 0.0 for t in summary["tenths"]), default=0.0) or 1.0
    return {
        "title": f"Pool {store.resolve().name}",
        "name": store.resolve().name,
        "stored": f"{summary['stored']:,}",
        "kept": f"{summary['kept']:,}",
        "share": f"{summary['kept'] / max(summary['stored'], 1):.0%}",
        "encoder": summary["encoder"],
        "twice": summary["same_key_other_content"],
        "arrived": f"{whole:,}",
        "of_arrived": f"{summary['kept'] / whole:.1%}",
        "map": coverage(view),
        "copies": words,
        "copy_groups": [entry for group in groups if (entry := _group(view, group))],
        "reasons": [
            {
                "name": name,
                "count": f"{n:,}",
                "share": f"{n / whole:.1%}",
                "width": round(100 * n / whole, 2),
                "about": _MEANING[name],
            }
            for name, n in counts.items()
        ],
        "groups": [
            group for name in counts if name != "near copy" and (group := _examples(view, name))
        ],
        "listed": _listed(view),
        "tenths": [
            {
                "number": number,
                "items": f"{tenth['items']:,}",
                "kept": f"{tenth['kept'] / max(tenth['items'], 1):.0%}",
                "gain": "" if tenth["gain"] is None else f"{tenth['gain']:.4f}",
                "width": round(100 * (tenth["gain"] or 0.0) / highest, 2),
            }
            for number, tenth in enumerate(summary["tenths"], start=1)
        ],
        "sources": [{**s, "items": f"{s['items']:,}"} for s in summary["sources"]],
    }


def _examples(view: AnyView, reason: str) -> dict[str, Any] | None:
    """Some stored items of one reason, evenly over their arrival."""
    ids, reasons = view.ids(), view.column("reason")
    places = np.flatnonzero(reasons == REASONS.index(reason))
    if not places.size:
        return None
    places = places[np.linspace(0, places.size - 1, min(places.size, _EXAMPLES)).astype(int)]
    shown = [int(i) for i in ids[places]]
    captions = [""] * len(shown)
    if reason == "kept" and view.versions(GAIN):
        captions = [
            "" if np.isnan(gain) else f"gain {gain:.3f}" for gain in view.scores(GAIN)[places]
        ]
    entries = _entries(view, list(zip(shown, captions, strict=True)))
    return {"title": f"{reason}: {_MEANING[reason]}", "items": entries}


def _group(view: AnyView, members: list[tuple[int, str]]) -> dict[str, Any] | None:
    """A group of near copies, unless what stood for it was forgotten."""
    if not np.isin([number for number, _ in members], view.ids()).all():
        return None
    return {
        "title": members[0][1],
        "items": _entries(view, [(members[0][0], "stands"), *members[1:]]),
    }


def _entries(view: AnyView, shown: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Items and words about each, all with pictures or all without, as the first."""
    items = view.items([number for number, _ in shown])
    entries = [_entry(item, words) for item, (_, words) in zip(items, shown, strict=True)]
    pictured = entries[0]["image"] is not None
    return [entry for entry in entries if (entry["image"] is not None) == pictured]


def _entry(item: Item, words: str) -> dict[str, Any]:
    text = "" if item.text is None else item.text[:_WORDS]
    label = f"label {item.label}" if item.label >= 0 else ""
    image = _small(item.image) if item.image is not None else None
    told = [words, text if image is not None else "", label, item.key[-80:]]
    return {
        "image": image,
        "text": text or f"a {item.kind}",
        "caption": ", ".join(part for part in told if part),
    }


def _small(data: bytes) -> str | None:
    from sparing.pool.encoders.images import ImageError, picture

    try:
        image = picture(data, near=_SIDE)
    except ImageError:
        return None
    image.thumbnail((_SIDE, _SIDE))
    held = io.BytesIO()
    image.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode("ascii")


def _listed(view: AnyView) -> list[dict[str, Any]]:
    """Some items that were never stored, by reason, the last ones first."""
    found: dict[str, list[dict[str, str]]] = {}
    for drop in reversed(view.drops()):
        rows = found.setdefault(drop.reason, [])
        if drop.reason != "kept" and len(rows) < _EXAMPLES:
            detail = drop.detail.removeprefix(f"{drop.key}: ")
            rows.append({"key": drop.key[-120:], "detail": detail[:_WORDS]})
    return [
        {"title": f"{reason}: {_MEANING[reason]}", "rows": rows}
        for reason, rows in found.items()
        if rows
    ]
