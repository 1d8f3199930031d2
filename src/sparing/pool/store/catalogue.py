"""The catalogue: which files there are and how far each is committed, in one database.

Everything that a store acknowledges becomes true by one transaction here. The statements are
SQLAlchemy Core's and no database's own; what SQLite needs besides is behind ``_prepare_sqlite``.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final
from urllib.parse import quote

from sparing.core.errors import RequestError, RunError
from sparing.pool.store import disk

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

FILE: Final = "catalogue.sqlite"
FORMAT: Final = 1
MIGRATIONS: Final[dict[int, Callable[[Any], None]]] = {}
"""By the format it begins from: what brings a catalogue, within a transaction, to the next."""


class Damaged(RunError):
    """The database fails, or does not say what it must."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file of the store, and how much of it is committed.

    kind: "payload", "vectors", "rows" (of all items, as they arrived), "column" and "score"
    (changes since). name: which vectors, column or score; version: of a score's model. first:
    parts of one kind are ordered by it, an id or for changes a change's number.
    """

    number: int
    kind: str
    name: str = ""
    version: str = ""
    file: str
    level: int = 0
    first: int
    rows: int
    bytes: int
    crc: int
    sealed: bool = True


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state of the store that stays readable. at: seconds since 1970."""

    number: int
    label: str
    change: int
    next_id: int
    size: int
    at: float


@final
@dataclass(slots=True, kw_only=True)
class State:
    """All that a reader needs to know, as of one transaction.

    ``change`` numbers the transactions; ``forgets`` and ``compacted`` are the numbers of the last
    ones that took something away.
    """

    settings: dict[str, Any]
    change: int = 0
    next_id: int = 0
    next_part: int = 1
    forgets: int = 0
    compacted: int = 0
    parts: dict[int, Part] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    sources: dict[str, tuple[int, Any]] = field(default_factory=dict)

    def of(self, kind: str, name: str = "", version: str | None = None) -> list[Part]:
        """The parts of one kind in their order."""
        found = (p for p in self.parts.values() if p.kind == kind and p.name == name)
        chosen = [p for p in found if version is None or p.version == version]
        return sorted(chosen, key=lambda part: (part.first, part.number))


@final
class Catalogue:
    """The tables, and the transactions on them."""

    def __init__(self, folder: Path, *, write: bool = False) -> None:
        """Raises RequestError if SQLAlchemy is missing, RunError if there is no store."""
        sa = sqlalchemy()
        self.path = folder / FILE
        self.write = write
        self.tables = _tables()
        url = sa.URL.create("sqlite", **_place(self.path, write))
        # a writer keeps one connection; readers open one for each look, so that a fork is safe
        pool = sa.pool.StaticPool if write else sa.pool.NullPool
        self.engine: Engine = sa.create_engine(
            url, poolclass=pool, connect_args={"timeout": 30.0, "check_same_thread": False}
        )
        _prepare_sqlite(self.engine)

    def create(self, settings: Mapping[str, Any]) -> None:
        """Make the tables of an empty store."""
        t = self.tables
        with self.engine.begin() as connection:
            t["metadata"].create_all(connection)
            rows = [{"name": k, "value": json.dumps(v)} for k, v in settings.items()]
            connection.execute(t["setting"].insert(), rows)
            connection.execute(t["counter"].insert().values(**_COUNTERS))

    def migrate(self) -> None:
        """Bring a store of an older format to this one, in one transaction."""
        table = self.tables["setting"]
        chosen = table.c.name == "format"
        with self.transaction("read") as connection:
            row = connection.execute(table.select().where(chosen)).one_or_none()
        found = _check_format(self.path, None if row is None else json.loads(row.value))
        if found == FORMAT:
            return
        with self.transaction("write") as connection:
            for older in range(found, FORMAT):
                if older not in MIGRATIONS:
                    raise RunError(f"this version does not read the store's format {older}")
                MIGRATIONS[older](connection)
            value = {"name": "format", "value": json.dumps(FORMAT)}
            connection.execute(table.update().where(chosen).values(value))

    def read(self) -> State:
        """The committed state. Raises RunError if it is damaged or of a newer version."""
        try:
            with self.transaction("read") as connection:
                return self.state(connection)
        except (ValueError, TypeError, KeyError, sqlalchemy().exc.SQLAlchemyError) as error:
            raise Damaged(
                f"the catalogue {self.path} is damaged ({type(error).__name__}: {error}); put back "
                f'a copy, or look at the store with "sparing pool check"'
            ) from error

    def state(self, connection: Connection) -> State:
        """``read`` within a transaction."""
        t = self.tables
        rows = connection.execute(t["setting"].select())
        settings = {row.name: json.loads(row.value) for row in rows}
        _check_format(self.path, settings.get("format"))
        _check_older(self.path, settings["format"])
        counter = connection.execute(t["counter"].select()).one()
        parts = [Part(**_plain(row)) for row in connection.execute(t["part"].select())]
        columns = {row.name: row.dtype for row in connection.execute(t["column"].select())}
        sources = {
            row.name: (row.number, json.loads(row.cursor))
            for row in connection.execute(t["source"].select())
        }
        return State(
            settings=settings,
            **{name: getattr(counter, name) for name in _COUNTERS if name != "one"},
            parts={part.number: part for part in parts},
            columns=columns,
            sources=sources,
        )

    @contextmanager
    def transaction(self, purpose: str) -> Iterator[Connection]:
        """One transaction, for all or nothing. Raises RunError if the database fails."""
        with self._failing():
            with self.engine.connect() as connection, connection.begin() as begun:
                yield connection
                if purpose == "write":
                    disk.tell("commit", self.path)
                begun.commit()
            if purpose == "write":
                disk.tell("committed", self.path)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        import sqlite3

        try:
            yield
        except (sqlalchemy().exc.DBAPIError, sqlite3.Error, UnicodeDecodeError) as error:
            raise Damaged(
                f"the catalogue {self.path} could not be {'written' if self.write else 'read'} "
                f"({getattr(error, 'orig', error)}); what was committed before is kept. See that "
                f"the disk has space and is writable, or look at the store with "
                f'"sparing pool check"'
            ) from error

    def snapshots(self) -> list[Snapshot]:
        """All, the oldest first."""
        with self.transaction("read") as connection:
            found = connection.execute(self.tables["snapshot"].select())
            return sorted((Snapshot(**_plain(row)) for row in found), key=lambda s: s.number)

    def close(self) -> None:
        """Give back the connections."""
        self.engine.dispose()

    def checkpoint(self) -> None:
        """Bring what is in SQLite's journal into the database and empty the journal."""
        self._maintain("PRAGMA wal_checkpoint(TRUNCATE)")

    def vacuum(self) -> None:
        """Give back the space of deleted rows, where the database does not do so itself."""
        self._maintain("VACUUM")

    def _maintain(self, statement: str) -> None:
        import sqlite3

        with self._failing(), self.engine.connect() as connection:
            raw = connection.connection.driver_connection
            if isinstance(raw, sqlite3.Connection):  # outside of any transaction
                raw.execute(statement).fetchall()

    def copy(self, target: Path) -> None:
        """A consistent copy of the database while others write."""
        import sqlite3

        with self._failing(), self.engine.connect() as connection:
            source = connection.connection.driver_connection
            assert isinstance(source, sqlite3.Connection)
            copied = sqlite3.connect(target)
            try:
                source.backup(copied)
            finally:
                copied.close()

    def problems(self) -> list[str]:
        """What the database itself finds damaged."""
        with self.transaction("read") as connection:
            if connection.dialect.name != "sqlite":
                return []
            found = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        return [f"{FILE}: {text}" for text in found if text != "ok"] or self._other_columns()

    def _other_columns(self) -> list[str]:
        """Tables with other columns than they were made with."""
        if self.engine.dialect.name != "sqlite":
            return []
        sa = sqlalchemy()
        made = sa.create_engine("sqlite://")
        self.tables["metadata"].create_all(made)
        found = []
        with made.connect() as usual, self.transaction("read") as connection:
            for name in self.tables["metadata"].tables:
                look = f'PRAGMA table_info("{name}")'
                expected = usual.exec_driver_sql(look).all()
                if connection.exec_driver_sql(look).all() != expected:
                    found.append(f'{FILE}: the columns of the table "{name}" are damaged')
        made.dispose()
        return found

    def damaged_rows(self) -> list[str]:
        """Rows that do not match their own checksum, by table."""
        found = []
        with self.transaction("read") as connection:
            for name, table in self.tables["metadata"].tables.items():
                rows = connection.execute(table.select()).mappings()
                fields = _marked(table)
                wrong = [r for r in rows if _mark([r[field] for field in fields]) != r["mark"]]
                if wrong:
                    first = ", ".join(f"{key} {value!r}" for key, value in wrong[0].items())
                    found.append(
                        f'{FILE}: {len(wrong)} rows of the table "{name}" do not match their '
                        f"checksum, the first: {first[:200]}"
                    )
        return found


_COUNTERS: Final = {
    "one": 1, "change": 0, "next_id": 0, "next_part": 1, "forgets": 0, "compacted": 0,
}  # fmt: skip


def sqlalchemy() -> Any:
    """The package. Raises RequestError that says how to install it."""
    try:
        import sqlalchemy
        import sqlalchemy.pool
    except ModuleNotFoundError as error:
        raise missing("sqlalchemy") from error
    return sqlalchemy


def missing(package: str) -> RequestError:
    """The error for a package that the store needs."""
    return RequestError(
        f'the store needs the package "{package}", which is not installed; '
        f'run: pip install "sparing[pool]"'
    )


def grown(part: Part, *, rows: int, size: int, crc: int) -> Part:
    """The part after so much was appended to its file."""
    return replace(part, rows=part.rows + rows, bytes=part.bytes + size, crc=crc)


def _check_format(path: Path, found: Any) -> int:
    if not isinstance(found, int):
        raise Damaged(f"{path} is no catalogue of a store; check the path")
    if found > FORMAT:
        raise RunError(
            f"the store at {path.parent} has format {found}, and this version reads up to "
            f"{FORMAT}; a newer version of sparing wrote it: upgrade with "
            f'"pip install --upgrade sparing"'
        )
    return found


def _check_older(path: Path, found: int) -> None:
    if found < FORMAT:
        raise RunError(
            f"the store at {path.parent} has the older format {found}; open it once for writing, "
            f"which brings it to format {FORMAT}"
        )


def _tables() -> dict[str, Any]:
    from sqlalchemy import (
        BigInteger,
        Boolean,
        Column,
        Float,
        Index,
        Integer,
        MetaData,
        String,
        Table,
        Text,
    )

    meta = MetaData()

    def key(name: str) -> Any:
        return Column(name, Integer, primary_key=True)

    def name() -> Any:
        return Column("name", String(64), primary_key=True)

    def big(name: str) -> Any:
        return Column(name, BigInteger, nullable=False)

    def word(name: str, **more: Any) -> Any:
        return Column(name, Text, nullable=False, **more)

    tables = {
        "setting": Table("setting", meta, name(), word("value")),
        "counter": Table("counter", meta, key("one"), *(big(n) for n in _COUNTERS if n != "one")),
        "part": Table(
            "part", meta, key("number"), word("kind"), word("name"), word("version"), word("file"),
            big("level"), big("first"), big("rows"), big("bytes"), big("crc"),
            Column("sealed", Boolean, nullable=False),
        ),
        "source": Table("source", meta, key("number"), word("name", unique=True), word("cursor")),
        "change": Table(
            "change", meta, key("number"), Column("at", Float, nullable=False), word("what"),
            word("note"),
        ),
        "snapshot": Table(
            "snapshot", meta, key("number"), word("label"), big("change"), big("next_id"),
            big("size"), Column("at", Float, nullable=False),
        ),
        "drop": Table(
            "drop", meta, key("number"), big("change"), word("source"), word("key"),
            word("reason"), word("detail"), Column("same", BigInteger),
        ),
        "column": Table("column", meta, name(), word("dtype")),
        "forgetting": Table(
            "forgetting", meta,
            Column("id", BigInteger, primary_key=True, autoincrement=False),
        ),
    }  # fmt: skip
    Index("drop_same", tables["drop"].c.same)
    for table in tables.values():  # the database itself does not see a flipped bit
        fill = _fill(_marked(table))
        table.append_column(Column("mark", BigInteger, nullable=False, default=fill, onupdate=fill))
    return {**tables, "metadata": meta}


def _marked(table: Any) -> list[str]:
    """The columns that a row's checksum is of: those that every statement gives."""
    own = {"drop": "number", "counter": "one"}.get(table.name)
    return [column.name for column in table.columns if column.name not in ("mark", own)]


def _mark(values: Sequence[Any]) -> int:
    plain = [float(v) if isinstance(v, float) else v for v in values]
    return zlib.crc32(repr([int(v) if isinstance(v, bool) else v for v in plain]).encode())


def _fill(fields: list[str]) -> Callable[[Any], int]:
    def made(context: Any) -> int:
        given = context.get_current_parameters()
        return _mark([given[field] for field in fields])

    return made


def _place(path: Path, write: bool) -> dict[str, Any]:
    """Where SQLite opens the file. In a folder that this process cannot write to, and nobody
    writes to now, it could not make its journal, and must be told that it needs none.
    """
    journal = path.with_name(f"{path.name}-wal")
    if write or os.access(path.parent, os.W_OK) or not path.is_file() or journal.exists():
        return {"database": str(path)}
    query = {"uri": "true", "mode": "ro", "immutable": "1"}
    return {"database": f"file:{quote(str(path))}", "query": query}


def _plain(row: Any) -> dict[str, Any]:
    return {name: value for name, value in row._mapping.items() if name != "mark"}


def _prepare_sqlite(engine: Engine) -> None:
    """What SQLite needs for durable, concurrent transactions; other databases have it."""
    from sqlalchemy import event

    if engine.dialect.name != "sqlite":
        return

    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver would begin transactions when it likes
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA secure_delete=ON")  # what is forgotten is overwritten
        cursor.close()

    def begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)
