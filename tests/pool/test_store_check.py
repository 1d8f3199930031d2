"""``check`` finds each planted corruption, and reading a damaged store is an error."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_model import DIM, texts, unit

from sparing.core.errors import RunError
from sparing.pool.items import Drop, Vectors
from sparing.pool.store import Store, catalogue, check, checking, forgetting


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sound") / "s"
    with Store.create(made, dim=DIM, shard=600) as store:
        for i in range(4):
            store.append(texts(4, f"n{i}", 3), Vectors(main=unit(4, i)), source="s")
        store.note_drops("s", [Drop(key="a", reason="unreadable", detail="a: cut short")])
        store.set_column("reason", [1], [2])
        store.set_scores("gain", [1, 2], [0.5, 0.25], version="v")
        store.snapshot()
    assert check(made) == []
    return made


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "s"))


def one(path: Path, pattern: str) -> Path:
    return sorted(path.glob(pattern))[0]


def flip(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 16
    file.write_bytes(data)


FILES = [
    "payload/*.bin",
    "vectors/main-*.bin",
    "columns/rows-*",
    "columns/reason-*",
    "scores/gain-*",
]


@pytest.mark.parametrize("pattern", FILES)
@pytest.mark.parametrize("place", [0.0, 0.37, 0.8, 1.0])
def test_a_flipped_bit(path: Path, pattern: str, place: float) -> None:
    file = one(path, pattern)
    flip(file, place)
    found = check(path)
    assert f"{file.relative_to(path)} does not match its checksum" in found


@pytest.mark.parametrize("pattern", FILES)
def test_a_cut_file(path: Path, pattern: str) -> None:
    file = one(path, pattern)
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.truncate(size - 1)
    assert f"{file.relative_to(path)} is cut short: {size - 1} of {size} bytes are left" in check(
        path
    )
    with pytest.raises(RunError, match="is damaged"):
        Store.open(path, write=True)
    assert file.stat().st_size == size - 1  # and nothing was made worse


@pytest.mark.parametrize("pattern", FILES)
def test_a_missing_file(path: Path, pattern: str) -> None:
    file = one(path, pattern)
    file.unlink()
    name = file.relative_to(path)
    assert f"{name} is missing though the catalogue lists it" in check(path)
    with pytest.raises(RunError, match="is missing though the catalogue lists it"):
        Store.open(path, write=True)


def test_an_orphan(path: Path) -> None:
    (path / "payload" / "00999.bin").write_bytes(b"left by a dead writer")
    (path / "columns" / "notes.txt").write_text("a user's own")
    assert [text[:17] for text in check(path)] == ["payload/00999.bin"]
    with Store.open(path, write=True):
        assert check(path) == []
    assert not (path / "payload" / "00999.bin").exists()
    assert (path / "columns" / "notes.txt").exists()


def test_bytes_behind_the_committed_length_are_no_damage(path: Path) -> None:
    file = sorted((path / "payload").iterdir())[-1]
    size = file.stat().st_size
    with open(file, "ab") as opened:
        opened.write(b"half a record")
    assert check(path) == []
    Store.open(path, write=True).close()
    assert file.stat().st_size == size


def test_damaged_items_are_named_and_not_given_out(path: Path) -> None:
    file = one(path, "payload/*.bin")
    flip(file, 0.5)
    named = [text for text in check(path) if "damaged items" in text]
    assert len(named) == 1
    number = int(named[0].split()[-1])
    with Store.open(path) as store:
        with pytest.raises(RunError, match=rf"{file.name} is damaged at byte \d+: item {number}"):
            store.items([number])
        others = [i for i in range(16) if i != number]
        assert len(store.items(others)) == 15


def test_a_damaged_segment_is_an_error_when_read(path: Path) -> None:
    flip(one(path, "scores/gain-*"), 0.5)
    with Store.open(path) as store, pytest.raises(RunError, match="does not match its checksum"):
        store.scores("gain")
    flip(one(path, "columns/rows-*"), 0.5)
    with pytest.raises(RunError, match="does not match its checksum"):
        Store.open(path)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("DELETE FROM part WHERE kind = 'payload' AND number = 1", "payload of"),
        ("DELETE FROM part WHERE kind = 'vectors' AND first = 0", "main vectors of"),
        ("UPDATE part SET rows = rows + 1 WHERE kind = 'score'", "holds 2 of 3 values"),
        ("UPDATE part SET crc = crc + 1 WHERE kind = 'column'", "does not match its checksum"),
        ("DELETE FROM source", "a source that the catalogue does not list"),
        ("UPDATE counter SET next_id = 9", "not ascending and below the next one"),
        ("UPDATE snapshot SET next_id = 99", "snapshot 1 is of items that do not exist"),
        ("INSERT INTO forgetting VALUES (3, 0)", "1 items are still to be forgotten"),
        ("UPDATE counter SET change = 2", "holds changes that were never made"),
        ("UPDATE drop_ SET detail = 'item 7'", '1 rows of the table "drop" do not match'),
        ("UPDATE change SET note = 'b'", 'rows of the table "change" do not match'),
        ("UPDATE source SET cursor = '1'", '1 rows of the table "source" do not match'),
        ("UPDATE source SET cursor = '{'", '1 rows of the table "source" do not match'),
        ("UPDATE setting SET value = '\"float\"' WHERE name = 'dtype'", 'table "setting" do not'),
        ("UPDATE snapshot SET change = 2", '1 rows of the table "snapshot" do not match'),
        ("UPDATE snapshot SET label = x'ff'", '1 rows of the table "snapshot" do not match'),
        ("UPDATE part SET file = x'ff' WHERE kind = 'score'", 'table "part" do not match'),
        ("UPDATE counter SET forgets = 1", '1 rows of the table "counter" do not match'),
        (
            "ALTER TABLE part RENAME COLUMN level TO devel",
            'columns of the table "part" are damaged',
        ),
        ("DROP TABLE forgetting", 'columns of the table "forgetting" are damaged'),
    ],
)
def test_a_catalogue_that_says_something_else(path: Path, statement: str, expected: str) -> None:
    connection = sqlite3.connect(path / catalogue.FILE)
    with connection:
        connection.execute(statement.replace("drop_", '"drop"'))
    connection.close()
    assert any(expected in text for text in check(path)), check(path)


def rows(path: Path) -> list[Any]:
    """All that the catalogue says; its one row of counters without its number."""
    held = catalogue.Catalogue(path)
    with held.transaction("read") as connection:
        tables = held.tables["metadata"].tables.values()
        chosen = [[c for c in table.columns if c.name != "one"] for table in tables]
        said = [
            connection.execute(table.select().with_only_columns(*some)).all()
            for table, some in zip(tables, chosen, strict=True)
        ]
    return said


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_in_the_catalogue(path: Path, count: int) -> None:
    """Whatever changes what the catalogue says is found: the database itself sees little."""
    file = path / catalogue.FILE
    data = file.read_bytes()
    usual = rows(path)
    random = np.random.default_rng(0)
    filled = np.flatnonzero(np.frombuffer(data, np.uint8))
    found = 0
    for place in random.choice(filled, count, replace=False).tolist():
        hurt = bytearray(data)
        hurt[place] ^= 1 << int(random.integers(8))
        file.write_bytes(hurt)
        for log in path.glob(f"{catalogue.FILE}-*"):
            log.unlink()
        try:
            problems = check(path)
        except RunError as error:  # a format that this version does not know
            problems = [str(error)]
        found += bool(problems)
        assert problems or rows(path) == usual, place
    assert found > 0.9 * count


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"no database" * 100),
        lambda file: file.write_bytes(file.read_bytes()[:5000]),
        lambda file: file.write_bytes(b""),
    ],
)
def test_a_damaged_catalogue(path: Path, damage: Callable[[Path], object]) -> None:
    damage(path / catalogue.FILE)
    assert check(path) != []
    for write in (False, True):
        with pytest.raises(RunError, match=catalogue.FILE):
            Store.open(path, write=write)
    assert len(list(path.glob("payload/*"))) > 1  # and what there is was not tidied away


def test_what_a_writer_did_since_the_check_began_is_no_damage(path: Path) -> None:
    known = catalogue.Catalogue(path)
    before = known.read()
    with Store.open(path, write=True) as store:
        added = store.append(texts(3, "later"), Vectors(main=unit(3, 9)), source="s")
        store.set_column("group", added.ids, [7, 7, 7])
        store.snapshot()
    assert checking._Check(path, before, known).problems() == []


def test_what_is_forgotten_while_a_check_goes_on_is_not_waiting(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(path) as view:
        first, second = view.ids().tolist()[:2]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forgetting, "_do", lambda store, ids: pytest.fail("not yet"))
        with pytest.raises(pytest.fail.Exception), Store.open(path, write=True) as store:
            store.forget([first])
    assert "1 items are still to be forgotten" in " ".join(check(path))

    def ended(folder: Path) -> bool:
        Store.open(folder, write=True).close()  # a writer comes, finishes it, and goes
        return False

    monkeypatch.setattr(checking.lock, "held", ended)
    found = [text for text in check(path) if "forgotten" in text]
    assert found == []
    with Store.open(path) as view:
        assert first not in view.ids()
        assert second in view.ids()
