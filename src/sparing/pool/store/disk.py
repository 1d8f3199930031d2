"""Every touch of the disk goes through here, in the order that a crash needs.

A test can look at each of them, and fail or kill the process at any, by ``watch``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

from sparing.core.errors import RunError

Watch = Callable[[str, Path, int], int | None]

watch: Watch | None = None
"""Called before each operation with its name ("write", "sync", "sync folder", "create", "remove",
"cut", "commit", "committed"), the file, and for a write the number of bytes. What it raises, the
operation raises; for a write it may return how many bytes one call to the system takes."""

_SYNC = getattr(os, "fdatasync", os.fsync)  # no such call on macOS


def tell(operation: str, path: Path, size: int = 0) -> int | None:
    """Let a test look at an operation that follows."""
    return None if watch is None else watch(operation, path, size)


@contextmanager
def failing(path: Path, kept: str) -> Iterator[None]:
    """Turn errors of the system into RunError that says what is still there."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space" if full else "check the disk and its permissions"
        raise RunError(
            f"could not write to the store at {path} ({error}); {kept}. To go on, {advice}, "
            f"and do the same again"
        ) from error


def create(path: Path) -> int:
    """Open a new file, or cut one that a dead writer left under this name to nothing."""
    tell("create", path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)


def open_(path: Path) -> int:
    """Open a file that is there for writing."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def write(handle: int, path: Path, data: Any, offset: int) -> None:
    """Write all bytes at ``offset``, however many the system takes at once."""
    view = memoryview(data).cast("B")
    while view:
        most = tell("write", path, len(view))
        done = os.pwrite(handle, view if most is None else view[:most], offset)
        if done == 0:
            raise OSError(errno.EIO, "nothing could be written", str(path))
        view = view[done:]
        offset += done


def sync(handle: int, path: Path) -> None:
    """Force what was written to a file to the disk."""
    tell("sync", path)
    _SYNC(handle)


@final
class Syncing:
    """Files, and folders that got new ones, are forced to the disk while the caller goes on.

    The disk serves them together: one after the other would take several times as long. No handle
    may be closed before ``wait`` has returned.
    """

    def __init__(self, handles: Mapping[Path, int], folders: Iterable[Path]) -> None:
        """Begin. Raises what ``watch`` does, and then nothing is under way."""
        work: list[Callable[[], None]] = []
        for path, handle in handles.items():
            tell("sync", path)
            work.append(partial(_SYNC, handle))
        for folder in folders:
            tell("sync folder", folder)
            work.append(partial(_sync_folder, folder))
        self._pool = ThreadPoolExecutor(min(max(len(work), 1), 8))
        self._under_way = [self._pool.submit(one) for one in work]
        self._pool.shutdown(wait=False)

    def wait(self) -> None:
        """Return when all of it is on the disk, or has failed; raises the first OSError then."""
        wait(self._under_way)
        for one in self._under_way:
            one.result()


def sync_all(handles: Mapping[Path, int], folders: Iterable[Path]) -> None:
    """Force files, and the folders that got new ones, to the disk."""
    if handles or folders:
        Syncing(handles, folders).wait()


def sync_folder(path: Path) -> None:
    """Force a folder's list of files to the disk."""
    tell("sync folder", path)
    _sync_folder(path)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cut(path: Path, size: int) -> None:
    """Cut off what lies behind the first ``size`` bytes."""
    tell("cut", path)
    os.truncate(path, size)


def remove(path: Path) -> None:
    """Delete a file that nothing refers to any more."""
    tell("remove", path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def copy(source: Path, target: Path, size: int) -> None:
    """Copy the first ``size`` bytes to a new file and force it to the disk."""
    tell("create", target)
    with open(source, "rb") as reading, open(target, "wb") as writing:
        left = size
        while left:
            block = reading.read(min(left, 1 << 22))
            if not block:
                raise OSError(errno.EIO, f"ends {left} bytes too early", str(source))
            writing.write(block)
            left -= len(block)
        writing.flush()
        os.fsync(writing.fileno())


def link(source: Path, target: Path, size: int) -> None:
    """Give a file that never changes a second name, or copy it where that cannot be."""
    try:
        tell("create", target)
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        copy(source, target, size)
