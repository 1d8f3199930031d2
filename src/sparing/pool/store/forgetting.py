"""Taking items away, on the disk: every file that holds one is written anew without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RunError
from sparing.pool.store import segments

if TYPE_CHECKING:
    from sparing.pool.store.change import Change
    from sparing.pool.store.writing import Writing


def forget(store: Writing, ids: NDArray[np.int64]) -> None:
    """Note what is to go, then make it go. ids: (n,) ascending, all in the store."""
    if not len(ids):
        return
    table = store._tables["forgetting"]
    try:
        with store._changing("to forget") as change:
            change.execute(table.delete())  # a request that a full disk let nobody take back
            change.execute(table.insert(), [{"id": number} for number in ids.tolist()])
        left = _do(store, ids)
    except Exception as error:
        _take_back(store, error)
        raise
    if left:
        raise RunError(
            f"the items are forgotten, but {', '.join(map(str, left))} could not be deleted and "
            f"still has their bytes; see that the disk is writable, and open the store again for "
            f"writing, which deletes it"
        )


def _take_back(store: Writing, error: Exception) -> None:
    """Not half: the request goes, if the disk lets. Raises RunError if it stays."""
    try:
        with store._changing("not forgotten") as change:
            change.execute(store._tables["forgetting"].delete())
    except RunError:
        raise RunError(
            f"{error}. The request to forget may stand all the same: when the store is next opened "
            "for writing, what was asked for is forgotten"
        ) from error


def redo(store: Writing) -> None:
    """Finish what a writer that died had begun."""
    catalogue = store._writable()
    with catalogue.transaction("read") as connection:
        found = connection.execute(catalogue.tables["forgetting"].select()).scalars().all()
    if found:
        ids = np.array(sorted(found), np.int64)
        _do(store, ids[np.isin(ids, store.ids())])
    elif store._state.forgets:
        catalogue.checkpoint()  # a writer may have died before it did this


def _do(store: Writing, ids: NDArray[np.int64]) -> list[Path]:
    """Make the change, and give files that could not be deleted."""
    with store._changing("forget") as change:
        places = store.positions(ids)
        gone = np.zeros(store.size, np.bool_)
        gone[places] = True
        _payload(store, change, gone)
        for which in store._kinds:
            _vectors(store, change, which, gone)
        _segments(store, change, ids)
        drops, forgetting = store._tables["drop"], store._tables["forgetting"]
        for begin in range(0, len(ids), 500):
            some = ids[begin : begin + 500].tolist()
            change.execute(drops.delete().where(drops.c.same.in_(some)))
        change.execute(forgetting.delete())
        store._state.forgets = change.number
    store._files.forget()
    store._load(None)
    catalogue = store._writable()
    try:
        catalogue.checkpoint()
    except RunError:  # what was deleted still stands in the journal
        return [*change.left, catalogue.path]
    return change.left


def _payload(store: Writing, change: Change, gone: NDArray[np.bool_]) -> None:
    start = 0
    for part in store._state.of("payload"):
        lost = gone[start : start + part.rows]
        if lost.any():
            begins = store._offsets[start : start + part.rows].astype(np.int64)
            ends = np.append(begins[1:], part.bytes)
            data = store._files.bytes_of(part)
            left = np.flatnonzero(~lost)
            kept = b"".join(data[begins[i] : ends[i]] for i in left.tolist())
            change.rewritten(part, kept, len(left))
        start += part.rows


def _vectors(store: Writing, change: Change, which: str, gone: NDArray[np.bool_]) -> None:
    start = 0
    for part in store._state.of("vectors", which):
        lost = gone[start : start + part.rows]
        if lost.any():
            block = store._files.matrix(
                part, store._state.settings["dtype"], store._state.settings["dim"]
            )
            kept = np.ascontiguousarray(block[~lost])
            change.rewritten(part, kept, len(kept))
        start += part.rows


def _segments(store: Writing, change: Change, ids: NDArray[np.int64]) -> None:
    pa = segments.arrow()
    for part in list(store._state.parts.values()):
        if part.kind in ("rows", "column", "score"):
            found = segments.values_of(store._files.table(part, ["id"]), "id", "int64")
            lost = np.isin(found, ids)
            if lost.any():
                data = store._files.table(part).filter(pa.array(~lost))
                change.rewritten(part, segments.encode(data), data.num_rows)
