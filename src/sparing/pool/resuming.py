"""What a pool knows beside its store, kept on the disk so that opening it again is quick.

All of it follows from the store. It is written now and then, and what the store has taken in since,
or lost, is made good when the pool is opened: a kill at any time loses nothing. Gains by the
released rule follow from what was there when an item arrived, of which some may have left since:
the store keeps them as scores.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from sparing.core import state
from sparing.core.errors import RequestError, RunError
from sparing.pool.intake import KEPT, NEAR_COPY
from sparing.pool.items import IMAGE_HASH
from sparing.pool.members import COPY, OUT, STANDS, Members

FOLDER: Final = "growth"
FORMAT: Final = 2
"""What is saved in another format is made anew."""
PAGE: Final = "report.html"
"""The page of a pool, which shows some of its items."""
ARRIVAL: Final = "gain at arrival"


def save(path: Path, members: Members, settings: dict[str, Any]) -> None:
    """Write what ``members`` know into the store's folder."""
    known = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in members.state().items()}
    tree = {"members": known, "indexes": members.outlines()}
    state.save(path / FOLDER, tree, meta={"growth": FORMAT, "settings": settings})


def settings(path: Path) -> dict[str, Any] | None:
    """Those that a pool was last closed with, None where nothing is saved."""
    if not state.complete(path / FOLDER).is_dir():
        return None
    meta = state.read(path / FOLDER).meta
    found = meta.get("settings") if isinstance(meta, dict) else None
    return found if isinstance(found, dict) else None


def discard(path: Path) -> None:
    """Take away what was saved, and the page, before items are forgotten."""
    with state.replacing(path / FOLDER):
        pass
    try:
        (path / PAGE).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{path / PAGE} may show what is to be forgotten, and cannot be deleted ({error}); "
            "delete it, and forget again"
        ) from error


def note_arrivals(store: Any, members: Members, ids: NDArray[np.int64]) -> None:
    """Keep the gains of new items by the released rule."""
    for which, near in members.named().items():
        gains = near.arrivals(ids)
        known = ~np.isnan(gains)
        if known.any():
            version = f"{which}, k={near.k}"
            store.set_scores(ARRIVAL, ids[known], gains[known], version=version)


def _recall_(members: Members, store: Any) -> None:
    for which, near in members.named().items():
        version = f"{which}, k={near.k}"
        if near.frozen and version in store.versions(ARRIVAL):
            near.recall_(store.scores(ARRIVAL, version))


def resume_(members: Members, store: Any, path: Path | None, settings: dict[str, Any]) -> None:
    """Bring empty ``members`` to what the store holds, from what was saved as far as it goes."""
    if members.bits >= 0:
        with suppress(RequestError):  # no image ever came
            members.marked_(store.column(IMAGE_HASH))
    if path is not None:
        _load_(members, store, path, settings)
    ids, reason = store.ids(), store.column("reason")
    role = np.select([reason == KEPT, reason == NEAR_COPY], [STANDS, COPY], OUT).astype(np.uint8)
    try:
        owner = store.column("group").astype(np.int64)
    except RequestError:  # nothing was ever grouped
        owner = np.full(ids.size, -1, np.int64)
    alone = members.align_(ids, role, owner)
    if path is not None:
        _recall_(members, store)
    if alone.size:
        store.set_column("reason", alone, np.full(alone.size, KEPT, np.int8))
        store.set_column("group", alone, alone)


def _load_(members: Members, store: Any, path: Path, settings: dict[str, Any]) -> None:
    if not state.complete(path / FOLDER).is_dir():
        return
    try:
        saved = state.read(path / FOLDER)
    except RunError:
        return  # it all follows from the store
    about = saved.meta if isinstance(saved.meta, dict) else {}
    if about.get("growth") != FORMAT or about.get("settings") != settings:
        return
    tree = {name: tensor.numpy() for name, tensor in saved.tree["members"].items()}
    stored = store.ids()
    known = tree["main.ids"]
    if not np.array_equal(stored[: known.size], known):
        return  # items were forgotten since
    try:
        members.load_(tree, saved.tree["indexes"], store.vectors)
    except RequestError as error:
        raise RunError(
            f"what is saved in {path / FOLDER} does not fit the store; delete that folder, it is "
            f"made anew from the store ({error})"
        ) from error
