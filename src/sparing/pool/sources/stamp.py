"""What a file was when it was read, so that a change between restarts is seen."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any, Final, NamedTuple

_END: Final = 2**16


class Listed(NamedTuple):
    """A file of a source: its path in the source's folder, with slashes, its size and time."""

    name: str
    size: int
    changed: int

    def line(self) -> bytes:
        """What the hash of a source's files takes of this one."""
        return f"{self.name}\0{self.size}\0{self.changed}\n".encode("utf-8", "surrogateescape")


def listed(path: Path, name: str) -> Listed:
    """The file as it is now."""
    about = path.stat()
    return Listed(name, about.st_size, about.st_mtime_ns)


def stamp(path: Path) -> dict[str, Any]:
    """Size, time of change, and a hash of the first and last 64 KiB, as plain JSON.

    A file that cannot be read, whose drop told so, has the size -1 and never differs.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # to open a pipe would wait for its writer
            raise OSError("no file")
        size, changed = about.st_size, about.st_mtime_ns
        return {"bytes": size, "changed": changed, "ends": _ends(path, size)}
    except (OSError, ValueError):
        return {"bytes": -1, "changed": 0, "ends": ""}


def difference(path: Path, was: dict[str, Any], *, growing: bool) -> str:
    """How the file differs from its stamp, in words; "" if it does not.

    ``growing``: what stands behind the end that the stamp knows is no difference. The time of
    change counts only for files of which the hash did not see every byte.
    """
    size: int = was["bytes"]
    if size < 0:
        return ""
    try:
        now = path.stat()
        same = now.st_size >= size and _ends(path, size) == was["ends"]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if now.st_size < size or (now.st_size > size and not growing):
        return f"had {size:,} bytes and has now {now.st_size:,}"
    if not same:
        return "has other content"
    if now.st_size == size and size > 2 * _END and now.st_mtime_ns != was["changed"]:
        return "was written anew"
    return ""


def _ends(path: Path, size: int) -> str:
    """A hash of the first and last 64 KiB of the file's first ``size`` bytes."""
    hashed = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        hashed.update(file.read(min(_END, size)))
        if size > _END:
            file.seek(max(_END, size - _END), os.SEEK_SET)
            hashed.update(file.read(size - max(_END, size - _END)))
    return hashed.hexdigest()
