"""Putting the disk right by what the catalogue says: after a kill, or a failed write."""

from __future__ import annotations

import re
from pathlib import Path

from sparing.core.errors import RunError
from sparing.pool.store import disk
from sparing.pool.store.catalogue import State
from sparing.pool.store.change import FOLDERS

_OURS = re.compile(r"(?:\w+-)?\d{5,}\.(?:bin|parquet)", re.ASCII)


def orphans(folder: Path, state: State) -> list[Path]:
    """Files of ours that the catalogue does not list."""
    listed = {part.file for part in state.parts.values()}
    found = []
    for name in sorted(set(FOLDERS.values())):
        if (folder / name).is_dir():
            for path in sorted((folder / name).iterdir()):
                if _OURS.fullmatch(path.name) and f"{name}/{path.name}" not in listed:
                    found.append(path)
    return found


def recover(folder: Path, state: State) -> None:
    """Cut what lies behind the committed length of each file, remove files that nothing lists.

    Raises RunError if a file has lost bytes that were committed; nothing is changed then.
    """
    long = []
    for part in state.parts.values():
        path = folder / part.file
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise RunError(
                f"{path} is missing though the catalogue lists it; put back a copy"
            ) from error
        if size < part.bytes:
            raise RunError(
                f"{path} is damaged: {size} of {part.bytes} bytes are left; put back a copy"
            )
        if size > part.bytes:
            long.append((path, part.bytes))
    for path, size in long:
        disk.cut(path, size)
    for path in orphans(folder, state):
        disk.remove(path)
    for name in set(FOLDERS.values()):
        (folder / name).mkdir(exist_ok=True)
