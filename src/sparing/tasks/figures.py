"""Figures of known methods on a task's data, measured once and kept in the user's cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sparing.core.cache import cache_folder
from sparing.core.errors import RunError
from sparing.core.state import atomic_write_json

Scores = dict[str, dict[str, float]]
"""By method, then by class and ``"mean"``."""


def kept(name: str, fingerprint: str, wanted: set[str], measure: Callable[[], Scores]) -> Scores:
    """What ``measure`` gives, once for the data of that hash; ``wanted``: the names of its rows."""
    path = cache_folder() / f"{name}-{fingerprint[:32]}.json"
    found = _read(path, wanted)
    if found is None:
        found = measure()
        with suppress(RunError):  # a cache that cannot be written only costs the seconds next time
            atomic_write_json(path, found)
    return found


def _read(path: Path, wanted: set[str]) -> Scores | None:
    """What the cache holds, if it is whole and of the right form."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        scores = {
            str(method): {str(name): float(value) for name, value in row.items()}
            for method, row in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return scores if scores and all(set(row) == wanted for row in scores.values()) else None
