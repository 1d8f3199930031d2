"""The catalogue's tables and statements are no database's own: they compile for PostgreSQL too."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from sparing.core.errors import RequestError, RunError
from sparing.pool import store as package
from sparing.pool.items import Drop, Item, Vectors
from sparing.pool.store import Store, backup, catalogue, check, compact
from sparing.pool.store.catalogue import Catalogue

DIALECT: Any = postgresql.dialect()


@pytest.fixture
def executed() -> Iterator[list[Any]]:
    """Every statement that goes through SQLAlchemy, of any engine."""
    seen: list[Any] = []

    def note(_connection: Any, statement: Any, _many: Any, _one: Any, _options: Any) -> None:
        seen.append(statement)

    sa.event.listen(sa.engine.Engine, "before_execute", note)
    yield seen
    sa.event.remove(sa.engine.Engine, "before_execute", note)


def everything(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a store asks its catalogue for."""
    with Store.create(path, dim=3) as made:
        for at in range(3):
            items = [Item(key=f"{at} {row}", text=f"{at} {row}") for row in range(4)]
            vectors = Vectors(main=np.ones((5, 3), np.float32))
            made.append(
                [*items, items[0]], vectors, source="s", cursor=at, columns={"own": np.ones(5)}
            )
        made.note_drops("t", [Drop(key="x", reason="unreadable")], 1)
        made.set_column("other", [0], [1])
        made.set_scores("gain", [0, 1], [0.5, 0.25], version="1")
        made.snapshot("one")
        made.drops(limit=2)
        made.lineage(1)
        made.forget([0, 5])
        assert made.snapshots()
    compact(path)
    assert check(path) == []
    backup(path, path.parent / "copy")
    with Catalogue(path, write=True).engine.begin() as connection:
        older = catalogue._tables()["setting"]
        chosen = older.c.name == "format"
        other = {"name": "format", "value": str(catalogue.FORMAT - 1)}
        connection.execute(older.update().where(chosen).values(other))
    monkeypatch.setitem(catalogue.MIGRATIONS, catalogue.FORMAT - 1, lambda connection: None)
    with Store.open(path, write=True) as again:
        assert len(again) == 10


def test_every_statement_compiles_for_postgresql(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executed: list[Any]
) -> None:
    everything(tmp_path / "store", monkeypatch)
    texts = {
        str(statement.compile(dialect=DIALECT, compile_kwargs={"render_postcompile": True}))
        for statement in executed
    }
    kinds = {(text.split()[0], text.split("FROM ")[-1].split()[0]) for text in texts}
    # the workload asks for each kind of statement
    begins = {text.split()[0] for text in texts}
    assert begins == {"CREATE", "INSERT", "SELECT", "UPDATE", "DELETE"}, begins
    tables = {name for name in catalogue._tables() if name != "metadata"}
    written = {text.split("INTO ")[1].split()[0].strip('"') for text in texts if "INTO " in text}
    assert written == tables
    read = {name.strip('"') for kind, name in kinds if kind == "SELECT"}
    assert read == tables - {"metadata"}
    # nothing is bound by a sign that only SQLite has
    assert not any("?" in text for text in texts)


def test_the_tables_in_postgresql() -> None:
    tables = catalogue._tables()
    made = {
        name: str(sa.schema.CreateTable(table).compile(dialect=DIALECT))
        for name, table in tables.items()
        if name != "metadata"
    }
    assert 'CREATE TABLE "column"' in made["column"]  # a word of its own is quoted
    assert "number SERIAL NOT NULL" in made["drop"]  # numbered by the database
    assert "id BIGINT NOT NULL" in made["forgetting"]
    for name in ("next_id", "change"):
        assert f"{name} BIGINT" in made["counter"]
    (index,) = tables["drop"].indexes
    assert "CREATE INDEX drop_same" in str(sa.schema.CreateIndex(index).compile(dialect=DIALECT))


def test_what_is_sqlites_own_stands_in_one_place() -> None:
    folder = Path(package.__file__).parent
    words = re.compile(r"PRAGMA|VACUUM|exec_driver_sql|import sqlite3|driver_connection|\btext\(\"")
    found = {
        file.name for file in folder.glob("*.py") if words.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"sqlite.py"}


def test_another_url_holds_the_catalogue(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "elsewhere").mkdir()
    url = f"sqlite:///{tmp_path / 'elsewhere' / 'shared.db'}"
    settings = {"format": catalogue.FORMAT, "dim": 3, "encoder": ""}
    made = Catalogue(tmp_path / "store", write=True, url=url)
    made.create(settings)
    made.close()
    read = Catalogue(tmp_path / "store", url=url)
    assert read.read().settings == settings
    assert read.problems() == []
    assert list((tmp_path / "store").iterdir()) == []
    with pytest.raises(RunError, match="could not be read"):
        Catalogue(tmp_path / "store", url=f"sqlite:///{tmp_path / 'none' / 'x.db'}").read()


def test_an_address_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no address of a database"):
        Catalogue(tmp_path, url="words")
    with pytest.raises(RequestError, match="is no address of a database"):
        Catalogue(tmp_path, url="nosuch://host/name")
    if importlib.util.find_spec("psycopg") is None:
        with pytest.raises(RequestError, match='needs the package "psycopg"'):
            Catalogue(tmp_path, url="postgresql+psycopg://user@host/name")
