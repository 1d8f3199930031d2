"""Who is near whom: indexes of vectors that grow, shrink and change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparing.core.errors import RunError, unknown
from sparing.pool.neighbours.auto import Auto
from sparing.pool.neighbours.blocks import by_row
from sparing.pool.neighbours.exact import Exact
from sparing.pool.neighbours.graph import Graph
from sparing.pool.neighbours.inverted import Inverted
from sparing.pool.neighbours.probe import Recall, probe
from sparing.pool.neighbours.protocol import (
    NOBODY,
    Found,
    Joined,
    Neighbours,
    Pairs,
    read_state,
)
from sparing.pool.neighbours.within import INCOMING, among, both, inside

__all__ = [
    "INCOMING",
    "NOBODY",
    "Auto",
    "Exact",
    "Found",
    "Graph",
    "Inverted",
    "Joined",
    "Neighbours",
    "Pairs",
    "Recall",
    "among",
    "both",
    "by_row",
    "inside",
    "load",
    "neighbours",
    "probe",
]

KINDS: dict[str, Any] = {kind.kind: kind for kind in (Auto, Exact, Inverted, Graph)}


def neighbours(dim: int, kind: str = "auto", **options: Any) -> Neighbours:
    """A new index of vectors with ``dim`` entries: "auto", "exact", "inverted" or "graph".

    options: those of its class. Raises RequestError for an unknown kind, with the nearest known
    one, and for a package that is not installed.
    """
    if kind not in KINDS:
        raise unknown("kind of index", kind, KINDS)
    found: Neighbours = KINDS[kind](dim, **options)
    return found


def load(path: str | Path, **options: Any) -> Neighbours:
    """The index that ``Neighbours.save`` wrote to ``path``.

    options: what is not saved, such as ``read`` or ``device``. Raises RunError for a directory that
    is damaged, holds no index, or comes from a newer version.
    """
    kind, state = read_state(path)
    if kind not in KINDS:
        raise RunError(f'the index at {path} is of kind "{kind}", which this version does not know')
    found: Neighbours = KINDS[kind].restored(state, **options)
    return found
