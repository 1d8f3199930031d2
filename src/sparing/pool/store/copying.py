"""A copy of a store, as of one moment, while a writer goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sparing.core.errors import RequestError, RunError
from sparing.core.state import replacing
from sparing.pool.store import disk
from sparing.pool.store.catalogue import FILE, Catalogue, Part
from sparing.pool.store.change import FOLDERS
from sparing.pool.store.store import Store

_TRIES: Final = 100


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
    with replacing(out) as aside:
        for name in sorted(set(FOLDERS.values())):
            (aside / name).mkdir()
        held: dict[str, int] = {}
        for _ in range(_TRIES):
            try:
                _catch_up(folder, aside, held)
            except FileNotFoundError:
                continue  # a merge took a file away while we were at it
            break
        else:
            raise RunError(
                f"the store at {folder} changes faster than it can be copied; end what writes to "
                "it, or try again later"
            )
        _finish(aside)


def _catch_up(folder: Path, aside: Path, held: dict[str, int]) -> None:
    """Copy what ``aside`` does not hold yet of the store as of now.

    held: the bytes of each file that is there, which committed bytes never change. So a further
    try has only that to do which a writer did meanwhile.
    """
    for end in ("", "-wal", "-shm"):
        aside.joinpath(f"{FILE}{end}").unlink(missing_ok=True)
    Catalogue(folder).copy(aside / FILE)
    copied = Catalogue(aside)
    state = copied.read()
    copied.close()
    for part in state.parts.values():
        if held.get(part.file) != part.bytes:
            held.pop(part.file, None)
            # never written to: it may be another name of the store's own file
            (aside / part.file).unlink(missing_ok=True)
            _one(folder, aside, part)
            held[part.file] = part.bytes
    for name in held.keys() - {part.file for part in state.parts.values()}:
        (aside / name).unlink()
        del held[name]


def _finish(aside: Path) -> None:
    for name in sorted(set(FOLDERS.values())):
        disk.sync_folder(aside / name)
    copied = Catalogue(aside)
    with copied.transaction("read") as connection:
        forgetting = connection.execute(copied.tables["forgetting"].select()).first()
    copied.close()
    if forgetting is not None:
        Store.open(aside, write=True).close()  # a writer finishes it, here in the copy


def _one(folder: Path, aside: Path, part: Part) -> None:
    source, target = folder / part.file, aside / part.file
    if part.sealed and source.stat().st_size == part.bytes:
        disk.link(source, target, part.bytes)
    else:
        disk.copy(source, target, part.bytes)
