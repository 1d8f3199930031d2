"""All that is SQLite's own: durable, concurrent transactions, upkeep, and copies of its file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

if TYPE_CHECKING:
    import sqlite3

    from sqlalchemy import Connection, Engine, MetaData

NAME: Final = "sqlite"
"""What SQLAlchemy calls it; of another database these functions do nothing."""


def url(path: Path, write: bool) -> Any:
    """The address of a file.

    In a folder that this process cannot write to, and nobody writes to now, SQLite could not make
    its journal, and must be told that it needs none.
    """
    from sqlalchemy import URL

    journal = path.with_name(f"{path.name}-wal")
    if write or os.access(path.parent, os.W_OK) or not path.is_file() or journal.exists():
        return URL.create(NAME, database=str(path))
    query = {"uri": "true", "mode": "ro", "immutable": "1"}
    return URL.create(NAME, database=f"file:{quote(str(path))}", query=query)


def error() -> type[Exception]:
    """What the driver raises."""
    import sqlite3

    return sqlite3.Error


def prepare(engine: Engine) -> None:
    """Have each connection write durably, overwrite what it deletes, and begin when it is told."""
    from sqlalchemy import event

    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver would begin transactions when it likes
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA secure_delete=ON")  # what is forgotten is overwritten
        cursor.close()

    def begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    if engine.dialect.name == NAME:
        event.listen(engine, "connect", connected)
        event.listen(engine, "begin", begun)


def checkpoint(connection: Connection) -> None:
    """Bring what is in the journal into the database and empty the journal."""
    _maintain(connection, "PRAGMA wal_checkpoint(TRUNCATE)")


def vacuum(connection: Connection) -> None:
    """Give back the space of deleted rows."""
    _maintain(connection, "VACUUM")


def _maintain(connection: Connection, statement: str) -> None:
    raw = _raw(connection)
    if raw is not None:  # outside of any transaction
        raw.execute(statement).fetchall()


def _raw(connection: Connection) -> sqlite3.Connection | None:
    import sqlite3

    found = connection.connection.driver_connection
    return found if isinstance(found, sqlite3.Connection) else None


def copy(connection: Connection, target: Path) -> bool:
    """Copy the database while others write; False for one that is no file of SQLite."""
    import sqlite3

    source = _raw(connection)
    if source is None:
        return False
    copied = sqlite3.connect(target)
    try:
        source.backup(copied)
    finally:
        copied.close()
    return True


def problems(connection: Connection) -> list[str]:
    """What the database itself finds damaged, within a transaction."""
    if connection.dialect.name != NAME:
        return []
    found = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
    return [text for text in found if text != "ok"]


def other_columns(connection: Connection, tables: MetaData) -> list[str]:
    """The names of tables with other columns than they are made with."""
    from sqlalchemy import create_engine

    if connection.dialect.name != NAME:
        return []
    found = []
    made = create_engine("sqlite://")
    tables.create_all(made)
    with made.connect() as usual:
        for name in tables.tables:
            look = f'PRAGMA table_info("{name}")'
            expected = usual.exec_driver_sql(look).all()
            if connection.exec_driver_sql(look).all() != expected:
                found.append(name)
    made.dispose()
    return found
