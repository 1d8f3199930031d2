"""What happened to an item, from all that the store has written of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from sparing.pool.items import REASONS
from sparing.pool.store import segments

if TYPE_CHECKING:
    from sparing.pool.store.view import Reading


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. at: seconds since 1970; what: "arrived", a column or a score;
    value: its source and key, the column's new value (a reason by name) or the score; version: of
    the model that gave the score; note: why, as the caller told.
    """

    change: int
    at: float
    what: str
    value: Any
    version: str = ""
    note: str = ""


def lineage(view: Reading, number: int) -> list[Event]:
    """All events of an item that the view sees, in order."""
    place = int(view.positions([number])[0])
    changes = {change: (at, note) for change, at, note in _changes(view)}
    found: list[tuple[int, str, Any, str]] = []
    arrived = int(view._column("change")[place])
    origin = {"source": view._column("source")[place], "key": view._column("key")[place]}
    found.append((arrived, "arrived", origin, ""))
    for part in sorted(view._state.parts.values(), key=lambda part: (part.first, part.number)):
        if part.kind not in ("column", "score"):
            continue
        data = view._files.table(part)
        mine = np.flatnonzero(segments.values_of(data, "id", "int64") == number)
        for row in mine.tolist():
            change, value = data.column("change")[row].as_py(), data.column("value")[row].as_py()
            if part.name == "reason" and part.kind == "column":
                value = REASONS[value]
            found.append((change, part.name, value, part.version))
    return [
        Event(change=change, at=changes[change][0], what=what, value=value, version=version,
              note=changes[change][1])
        for change, what, value, version in sorted(found, key=lambda event: event[0])
        if change <= view._moment.change
    ]  # fmt: skip


def _changes(view: Reading) -> list[tuple[int, float, str]]:
    catalogue = view._catalogue_to_read()
    with catalogue.transaction("read") as connection:
        rows = connection.execute(catalogue.tables["change"].select()).all()
    return [(row.number, row.at, row.note) for row in rows]
