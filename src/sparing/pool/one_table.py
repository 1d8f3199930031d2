"""Small SQLite files of one table, for what stands beside a pool: a cache, a queue."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sparing.core.errors import RequestError, RunError


def opened(path: str | Path | None, what: str, format_: int, table: str) -> sqlite3.Connection:
    """The database at ``path``, in memory without one, with ``table`` (SQL) made if it is new.

    What is deleted is overwritten. Raises RequestError, which says that it is no ``what``, for
    another kind of file, and for one of a newer format.
    """
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        db = sqlite3.connect(":memory:" if path is None else path, timeout=60)
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA journal_mode = WAL")
        held = int(db.execute("PRAGMA user_version").fetchone()[0])
        if held > format_:
            raise RequestError(
                f"the {what} {path} has format {held}; this version reads up to {format_}: take a "
                "newer sparing, or another file"
            )
        with db:
            db.execute(table)
            db.execute(f"PRAGMA user_version = {format_}")
    except sqlite3.Error as error:
        raise RequestError(
            f"{path} is no {what} ({error}); give a new file, or one made by sparing"
        ) from error
    return db


def truncate_log(db: sqlite3.Connection, name: str) -> None:
    """What was deleted must not survive in the log of writes. Raises RunError while others read."""
    busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if busy:
        raise RunError(
            f"what was forgotten still lies in the log of {name}, which another process is "
            "reading; forget it again when that one has ended"
        )
