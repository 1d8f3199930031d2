"""One writer at a time, held by the operating system, so that a dead writer holds nothing."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from pathlib import Path
from typing import final

from sparing.core.errors import RunError

FILE = "LOCK"
TRIES, PAUSE = 5, 0.02
"""How often a writer asks again, and after how many seconds."""


@final
class WriterLock:
    """The right to write to one store, until ``release`` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        """Raises RunError that names the holder's process if another one writes."""
        self.path = folder / FILE
        self._handle: int | None = None
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(
                f"the store at {folder} cannot be opened for writing ({error}); check its "
                f"permissions, or open it for reading"
            ) from error
        try:
            _take(self._handle)
        except OSError as error:
            holder = os.pread(self._handle, 100, 0).decode("ascii", "replace").strip()
            os.close(self._handle)
            self._handle = None
            who = f"process {holder}" if holder else "another process"
            raise RunError(
                f"the store at {folder} is being written by {who}; a store has one writer: wait "
                f"for it or end it, or open the store for reading"
            ) from error
        # who holds it is told to others; that the lock is held does not hang on this
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        _HELD.add(self)

    @property
    def mine(self) -> bool:
        """Whether this process holds it: a forked child does not."""
        return self._handle is not None

    def release(self) -> None:
        """Let others write; once is enough."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        _HELD.discard(self)


def _take(handle: int) -> None:
    """Take the lock. Whoever asks whether it is ``held`` has it for a moment, so more than once."""
    import fcntl

    for _ in range(TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            time.sleep(PAUSE)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def held(folder: Path) -> bool:
    """Whether a process, this one included, writes to the store now."""
    import fcntl

    try:
        handle = os.open(folder / FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


_HELD: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _let_go() -> None:
    """A forked child shares its parent's lock, and would hold it after the parent's death."""
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
