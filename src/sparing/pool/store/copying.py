"""A copy of a store, as of one moment, while a writer goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sparing.core.errors import RequestError, RunError
from sparing.core.state import replacing
from sparing.pool.store import disk
from sparing.pool.store.catalogue import FILE, Catalogue, Part, State
from sparing.pool.store.change import FOLDERS
from sparing.pool.store.store import Store

_TRIES: Final = 20


def backup(path: str | Path, out: str | Path) -> None:
    """Make ``out`` a store that is the one at ``path`` as of now.

    Files that never change are hard links where the disk allows that, others are copied. The copy
    is complete or not there at all. What was being forgotten is not in it; what is forgotten later
    stays. Raises RequestError if there is something at ``out``, RunError if there is no store or
    the disk is full.
    """
    folder, out = Path(path), Path(out)
    if not (folder / FILE).is_file():
        raise RunError(f"there is no store at {folder}; check the path")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} is there already and not empty; give another place")
    if out.resolve().is_relative_to(folder.resolve()):
        raise RequestError(f"{out} is inside the store; give a place outside")
    for _ in range(_TRIES):
        try:
            with replacing(out) as aside:
                _copy(folder, aside)
        except RunError as error:
            # a merge took a file away while we were at it
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            gone = error
            continue
        return
    raise gone


def _copy(folder: Path, aside: Path) -> None:
    Catalogue(folder).copy(aside / FILE)
    copied = Catalogue(aside)
    state = copied.read()
    with copied.transaction("read") as connection:
        forgetting = connection.execute(copied.tables["forgetting"].select()).first()
    copied.close()
    for name in sorted(set(FOLDERS.values())):
        (aside / name).mkdir()
    for part in state.parts.values():
        _one(folder, aside, part, state)
    for name in sorted(set(FOLDERS.values())):
        disk.sync_folder(aside / name)
    if forgetting is not None:
        Store.open(aside, write=True).close()  # a writer finishes it, here in the copy


def _one(folder: Path, aside: Path, part: Part, state: State) -> None:
    source, target = folder / part.file, aside / part.file
    if part.sealed and source.stat().st_size == part.bytes:
        disk.link(source, target, part.bytes)
    else:
        disk.copy(source, target, part.bytes)
