"""Lines of JSON from files, each with where it stands; your own sources."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparing.core.errors import RequestError
from sparing.core.lines import numbered_json


def read(path: Path) -> Iterator[tuple[str, Any]]:
    """("line 3 of file", what it holds) of each line that is not empty.

    Raises RequestError for a file that cannot be read and for a line that is not JSON.
    """
    for number, row in numbered_json(path):
        yield f"line {number} of {path}", row


def load(
    files: Mapping[str, str], split: str, held_out: float
) -> dict[str, tuple[list[Any], list[Any]]]:
    """(training, held-out) rows by source, each row as (where, row).

    Which part a row is in is decided by a hash of what is asked, so that rows which ask the same
    are in one part: the last ``held_out`` share of hashes is final, that before it development.
    Raises RequestError for an empty source, and for one too small to be split.
    """
    found = {}
    for name, path in files.items():
        parts: dict[str, list[Any]] = {"train": [], "development": [], "final": []}
        for where, row in read(Path(path)):
            place = _place(row)
            part = (
                "final"
                if place >= 1 - held_out
                else "development"
                if place >= 1 - 2 * held_out
                else "train"
            )
            parts[part].append((where, row))
        if not any(parts.values()):
            raise RequestError(f'the source "{name}" is empty: {path} has no line; leave it out')
        train = parts["train"] + (parts["development"] if split == "final" else [])
        if not train or not parts[split]:
            raise RequestError(
                f'the source "{name}" in {path} is too small to be split: {len(train)} examples '
                f"to train on and {len(parts[split])} held out; add examples or raise held_out"
            )
        found[name] = (train, parts[split])
    return found


def _place(row: Any) -> float:
    """Where a row's question falls in [0, 1)."""
    asked = row
    if isinstance(row, Mapping):
        asked = row.get("prompt", row.get("messages"))
        if isinstance(asked, list):
            asked = [m for m in asked if isinstance(m, Mapping) and m.get("role") == "user"]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
