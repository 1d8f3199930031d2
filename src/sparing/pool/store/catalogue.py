"""The catalogue: which files there are and how far each is committed, in one database.

Everything that a store acknowledges becomes true by one transaction here. The statements are
SQLAlchemy Core's and no database's own; what SQLite needs besides is in ``sqlite``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from sparing.core.errors import RequestError, RunError
from sparing.pool.store import disk, sqlite

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

    def __init__(self, folder: Path, *, write: bool = False, url: str | None = None) -> None:
        """url: SQLAlchemy's address of another database, such as one of PostgreSQL, in the place of
        the folder's own file. Raises RequestError if SQLAlchemy or the database's driver is
        missing, or for no URL.
        """
        sa = sqlalchemy()
        self.path = folder / FILE
        self.write = write
        self.tables = _tables()
        try:
            made = sqlite.url(self.path, write) if url is None else sa.make_url(url)
            own = made.get_backend_name() == sqlite.NAME
            # a writer keeps one connection; readers open one for each look, so that a fork is safe
            self.engine: Engine = sa.create_engine(
                made,
                poolclass=sa.pool.StaticPool if write else sa.pool.NullPool,
                connect_args={"timeout": 30.0, "check_same_thread": False} if own else {},
                # all reads of a transaction see one state; of SQLite's they do anyway
                **({} if own else {"isolation_level": "REPEATABLE READ"}),
            )
        except ModuleNotFoundError as error:
            raise RequestError(
                f'the catalogue\'s database needs the package "{error.name}", which is not '
                "installed; install it, or name another driver in the URL"
            ) from error
        except sa.exc.ArgumentError as error:
            raise RequestError(
                f"{url!r} is no address of a database ({error}); expected one like "
                '"postgresql+psycopg://user@host/name"'
            ) from error
        sqlite.prepare(self.engine)

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
        try:
            yield
        except (sqlalchemy().exc.DBAPIError, sqlite.error(), UnicodeDecodeError) as error:
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
        """Leave nothing of what was deleted in the database's journal."""
        with self._failing(), self.engine.connect() as connection:
            sqlite.checkpoint(connection)

    def vacuum(self) -> None:
        """Give back the space of deleted rows, where the database does not do so itself."""
        with self._failing(), self.engine.connect() as connection:
            sqlite.vacuum(connection)

    def copy(self, target: Path) -> None:
        """A consistent copy of the database, as a file, while others write."""
        with self._failing(), self.engine.connect() as connection:
            if not sqlite.copy(connection, target):
                raise RunError(
                    f"the catalogue of {self.path.parent} is no file ({connection.dialect.name}); "
                    "copy it with the database's own tools"
                )

    def problems(self) -> list[str]:
        """What the database itself finds damaged."""
        with self.transaction("read") as connection:
            found = sqlite.problems(connection)
            if not found:
                tables = sqlite.other_columns(connection, self.tables["metadata"])
                found = [f'the columns of the table "{name}" are damaged' for name in tables]
            return [f"{FILE}: {text}" for text in found]

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


def _plain(row: Any) -> dict[str, Any]:
    return {name: value for name, value in row._mapping.items() if name != "mark"}
