"""Which entries of which matrices exist: a share and a coarse picture for each."""

from __future__ import annotations

from itertools import takewhile
from typing import Any, Final

from sparing.run.report.passages import LEVELS
from sparing.run.report.read import Run, number
from sparing.run.report.words import percent, visible

MOST: Final = 48
"""Matrices that are shown; of more, those are left out that come after these."""


def kept(run: Run) -> dict[str, Any] | None:
    """What the section shows, None where every parameter was trained or none was chosen."""
    given = run.page.get("kept") or {}
    start = _common([str(name) for name in given])
    found = [entry for name, about in given.items() if (entry := _entry(str(name)[start:], about))]
    if not found:
        return None
    trained = sum(entry["kept"] for entry in found)
    size = sum(entry["size"] for entry in found)
    return {
        "share": percent(trained / size),
        "kept": f"{trained:,}",
        "size": f"{size:,}",
        "matrices": found[:MOST],
        "more": len(found) - len(found[:MOST]),
    }


def _common(names: list[str]) -> int:
    """The length of the module path that all names begin with."""
    modules = zip(*(name.split(".") for name in names), strict=False)
    shared = [steps[0] for steps in takewhile(lambda steps: len(set(steps)) == 1, modules)]
    return len(".".join([*shared, ""])) if len(names) > 1 else 0


def _entry(name: str, about: Any) -> dict[str, Any] | None:
    shape = about.get("shape") if isinstance(about, dict) else None
    if not isinstance(shape, list) or len(shape) != 2:
        return None
    count, size = number(about.get("kept")), shape[0] * shape[1]
    if count is None or not size:
        return None
    grid = about.get("grid") or []
    return {
        "name": visible(name),
        "shape": f"{shape[0]} x {shape[1]}",
        "kept": int(count),
        "size": int(size),
        "share": percent(count / size),
        "columns": max((len(row) for row in grid), default=0),
        "rows": [
            [round((LEVELS - 1) * min(1.0, max(0.0, float(share)))) for share in row]
            for row in grid
        ],
    }
