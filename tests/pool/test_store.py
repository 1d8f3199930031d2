"""The store's promises to its callers, without faults."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_model import DIM, Model, agree, create, steps, texts, unit

from sparing.core.errors import RequestError, RunError
from sparing.pool.items import REASONS, Added, Drop, Item, Vectors
from sparing.pool.store import (
    Store,
    backup,
    catalogue,
    check,
    compact,
    content_hash,
    copying,
    lock,
    merging,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with Store.create(tmp_path / "s", dim=DIM, encoder="e") as made:
        yield made


def put(store: Store, n: int = 4, name: str = "a", **more: object) -> Added:
    return store.append(texts(n, name), Vectors(main=unit(n, n)), source="src", **more)


def test_all_steps_agree_with_plain_dictionaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "FAN", 3)
    create(tmp_path / "s")
    model = Model()
    with Store.open(tmp_path / "s", write=True) as store:
        for _, real, plain in steps():
            real(store)
            plain(model)
            agree(store, model)
    with Store.open(tmp_path / "s") as store:
        agree(store, model)
    assert check(tmp_path / "s") == []
    compact(tmp_path / "s")
    assert check(tmp_path / "s") == []
    with Store.open(tmp_path / "s") as store:
        agree(store, model)


def test_every_kind_of_item_comes_back_as_it_was(store: Store) -> None:
    tensor = np.arange(6, dtype=np.float64).reshape(2, 3).T
    items = [
        Item(key="a\udcff.png", image=b"\x89PNG\0\xff" * 3),
        Item(key="b", image=b"", text="caption"),
        Item(key="ünï", text="über\0 \ud800", label=-7),
        Item(key="d", tensor=tensor, label=1 << 40),
        Item(key="e", tensor=np.float16(2.5).reshape(())),
        Item(key="", tensor=np.zeros((0, 3), bool)),
    ]
    ids = store.append(items, None, source="s").ids
    for found, item in zip(store.items(ids), items, strict=True):
        assert (found.key, found.image, found.text, found.label, found.kind) == (
            item.key, item.image, item.text, item.label, item.kind,
        )  # fmt: skip
        if item.tensor is not None:
            assert found.tensor is not None
            assert found.tensor.dtype == item.tensor.dtype
            np.testing.assert_array_equal(found.tensor, item.tensor)
    assert store.column("kind").tolist() == [item.kind for item in items]
    assert store.column("key")[0] == "a\\udcff.png"
    assert np.isnan(store.vectors()).all()


def test_the_same_content_is_stored_once_and_its_item_named(store: Store) -> None:
    first = put(store, 3)
    again = [Item(key="x", text="new"), *texts(2, "a"), Item(key="y", text="new")]
    added = store.append(again, Vectors(main=unit(4, 1)), source="other")
    assert added.ids.tolist() == [3, -1, -1, -1]
    assert added.drops == (
        Drop(key="a/0", reason="same content", detail=f"item {first.ids[0]}"),
        Drop(key="a/1", reason="same content", detail=f"item {first.ids[1]}"),
        Drop(key="y", reason="same content", detail="item 3"),
    )
    assert store.drops() == list(added.drops)
    assert store.drops(limit=1) == [added.drops[-1]]
    # the same text under another label says something else
    assert store.append([Item(key="x", text="new", label=5)], None, source="other").ids[0] == 4


def test_a_key_used_twice_for_other_content_is_stored_and_told(store: Store) -> None:
    put(store, 1)
    items = [Item(key="a/0", text="other"), Item(key="k", text="1"), Item(key="k", text="2")]
    added = store.append(items, None, source="src")
    assert (added.ids >= 0).all()
    assert [(drop.key, drop.reason) for drop in added.drops] == [("a/0", "kept"), ("k", "kept")]
    assert "used this key before" in added.drops[0].detail
    elsewhere = store.append([Item(key="a/0", text="third")], None, source="another")
    assert elsewhere.drops == ()


def test_cursors_are_kept_with_what_they_stand_behind(store: Store) -> None:
    put(store, 1, cursor={"line": 3})
    put(store, 1, "b")
    assert store.sources() == {"src": {"line": 3}}
    store.note_drops("src", [Drop(key="bad", reason="unreadable", detail="cut")], cursor=[9, None])
    store.append([], None, source="empty", cursor="done")
    assert store.sources() == {"src": [9, None], "empty": "done"}
    with pytest.raises(RequestError, match="value of JSON"):
        put(store, 1, "c", cursor=float("nan"))
    with pytest.raises(RequestError, match='did you mean "unreadable"'):
        store.note_drops("src", [Drop(key="k", reason="unreadible")])


def test_columns_take_defaults_types_and_history(store: Store) -> None:
    put(store, 2)
    ids = put(store, 2, "b", columns={"group": np.array([5, 6], np.int32)}).ids
    assert store.column("group").tolist() == [-1, -1, 5, 6]
    assert store.column("group").dtype == np.int32
    store.set_column("url", ids, np.array(["x", "y"]))
    store.set_column("width", [0], [2.5])
    store.set_column("seen", [1], [True])
    assert store.column("url").tolist() == ["", "", "x", "y"]
    np.testing.assert_array_equal(store.column("width"), [2.5, np.nan, np.nan, np.nan])
    assert store.column("seen").tolist() == [False, True, False, False]
    store.set_column("label", [0, 0], [8, 9])  # the last one counts
    assert store.column("label").tolist() == [9, 1, 0, 1]
    assert store.column("source").tolist() == ["src"] * 4
    for name, values, error in [
        ("group", ["text"], "holds int32"),
        ("group", [1 << 40], "do not fit"),
        ("group", [0.5], "do not fit"),
        ("id", [1], "fixed"),
        ("two words", [1], "no name"),
        ("group", [1, 2], "needs 1 values"),
        ("reason", [len(REASONS)], "REASONS"),
        ("reason", [-1], "REASONS"),
        ("other", [b"bytes"], "numbers, truth values or texts"),
    ]:
        with pytest.raises(RequestError, match=error):
            store.set_column(name, [0], values)
    with pytest.raises(RequestError, match='unknown column "grup"; did you mean "group"'):
        store.column("grup")


def test_scores_of_each_version_stay(store: Store) -> None:
    put(store, 3)
    store.set_scores("gain", [0, 1], [0.5, 0.25], version="v1")
    store.set_scores("gain", [1], [0.75], version="v2")
    np.testing.assert_array_equal(store.scores("gain"), np.float32([np.nan, 0.75, np.nan]))
    np.testing.assert_array_equal(store.scores("gain", "v1"), np.float32([0.5, 0.25, np.nan]))
    assert store.versions("gain") == ["v1", "v2"]
    store.set_scores("gain", [2], [1.0], version="v1")
    assert store.versions("gain") == ["v2", "v1"]
    with pytest.raises(RequestError, match="unknown score"):
        store.scores("loss")
    with pytest.raises(RequestError, match="unknown version"):
        store.scores("gain", "v3")
    with pytest.raises(RequestError, match="as many scores"):
        store.set_scores("gain", [0], [1.0, 2.0], version="v1")


def test_lineage_tells_what_happened_to_an_item(store: Store) -> None:
    put(store, 2)
    store.set_column("reason", [1], [2], note="near item 0")
    store.set_scores("gain", [0, 1], [0.5, 0.25], version="v1", note="epoch 3")
    store.set_column("reason", [1], [0], note="undone")
    events = store.lineage(1)
    assert [(e.what, e.value, e.version, e.note) for e in events] == [
        ("arrived", {"source": "src", "key": "a/1"}, "", ""),
        ("reason", "near copy", "", "near item 0"),
        ("gain", 0.25, "v1", "epoch 3"),
        ("reason", "kept", "", "undone"),
    ]
    assert [e.change for e in events] == sorted(e.change for e in events)


def test_wrong_vectors_are_refused_and_nothing_is_stored(store: Store) -> None:
    good = unit(2, 0)
    nan, inf = good.copy(), good.copy()
    nan[1, 2], inf[0, 0] = np.nan, np.inf
    for main, error in [
        (good[:, :3], r"shape \(2, 3\), expected \(2, 4\)"),
        (good[:1], r"shape \(1, 4\)"),
        (nan, "not finite in float32, the first is row 1"),
        (inf, "not finite in float32, the first is row 0"),
    ]:
        with pytest.raises(RequestError, match=error):
            store.append(texts(2, "a"), Vectors(main=main), source="s")
    with pytest.raises(RequestError, match="second=True"):
        store.append(texts(2, "a"), Vectors(main=good, second=good), source="s")
    with pytest.raises(RequestError, match="needs an image, a text or a tensor"):
        store.append([Item(key="empty")], None, source="s")
    with pytest.raises(RequestError, match="holds numbers"):
        store.append([Item(key="o", tensor=np.array([None]))], None, source="s")
    assert store.size == 0
    assert store.sources() == {}
    with pytest.raises(RequestError, match="3 of 3 ids are not in the store"):
        store.vectors([0, 1, 2])


def test_half_precision_and_second_vectors(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", dim=DIM, dtype="float16", second=True, shard=50) as store:
        first, second = unit(9, 1), unit(9, 2)
        store.append(texts(9, "a"), Vectors(main=first, second=second), source="s")
        store.append(texts(2, "b"), Vectors(main=first[:2]), source="s")
        assert store.vectors().dtype == np.float32
        np.testing.assert_allclose(store.vectors()[:9], first, atol=1e-3)
        np.testing.assert_allclose(store.vectors([8, 0], "second"), second[[8, 0]], atol=1e-3)
        assert np.isnan(store.vectors([9, 10], "second")).all()
        big = np.full((1, DIM), 1e6, np.float32)
        with pytest.raises(RequestError, match="not finite in float16"):
            store.append(texts(1, "c"), Vectors(main=big), source="s")
        store.forget([1, 9])
        np.testing.assert_allclose(store.vectors(which="second")[1], second[2], atol=1e-3)
    assert check(tmp_path / "s") == []


def test_what_is_forgotten_is_nowhere_on_the_disk(tmp_path: Path) -> None:
    secret = "correct horse battery staple"
    with Store.create(tmp_path / "s", dim=DIM) as store:
        put(store, 3)
        rows = unit(2, 77)
        secrets = [Item(key=f"key-{secret}-{i}", text=f"text {secret} {i}") for i in range(2)]
        ids = store.append(secrets, Vectors(main=rows), source="src").ids
        store.append([Item(key=f"copy-{secret}", text=f"text {secret} 0")], None, source="src")
        store.set_column("note", ids, [f"note {secret}"] * 2)
        store.set_scores("gain", ids, [1 / 3, 1 / 7], version="v")
        snapshot = store.snapshot()
        held = [secret.encode(), rows[0].tobytes(), np.float32(1 / 3).tobytes()]
        held.append(content_hash(secrets[0]))
        for pattern in held:
            assert _anywhere(tmp_path, pattern), pattern
        store.forget(ids)
        for pattern in held:
            assert _anywhere(tmp_path, pattern) == [], pattern
        assert (tmp_path / "s" / "catalogue.sqlite-wal").stat().st_size == 0
        assert store.at(snapshot).ids().tolist() == [0, 1, 2]
        assert store.drops() == []
        # the content may come again, under an id that was never used
        assert store.append(secrets, None, source="src").ids.tolist() == [5, 6]
    assert check(tmp_path / "s") == []


def _anywhere(folder: Path, pattern: bytes) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and pattern in p.read_bytes()]


def test_everything_may_be_forgotten(store: Store) -> None:
    put(store, 3)
    store.snapshot()
    store.forget(store.ids())
    store.forget([])
    assert (store.size, store.at(1).size, store.vectors().shape) == (0, 0, (0, DIM))
    assert put(store, 2).ids.tolist() == [3, 4]
    with pytest.raises(RequestError, match="never stored here, or forgotten"):
        store.forget([0])


def test_a_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", dim=DIM) as store:
        with pytest.raises(RunError, match=f"being written by process {os.getpid()}"):
            Store.open(tmp_path / "s", write=True)
        code = (
            "import sys; from sparing.pool.store import Store\n"
            "try: Store.open(sys.argv[1], write=True)\n"
            "except Exception as error: print(error)"
        )
        said = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True
        )
        assert f"being written by process {os.getpid()};" in said.stdout, said
        put(store, 1)
    Store.open(tmp_path / "s", write=True).close()


def test_who_asks_whether_a_store_is_written_keeps_no_writer_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``held`` has the lock for a moment: here until the writer has asked once."""
    store.close()
    other = os.open(store.path / lock.FILE, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: os.close(other))
    with Store.open(store.path, write=True) as again:
        put(again, 1)
        assert again.size == 1


def test_a_forked_worker_reads_but_neither_writes_nor_holds_the_lock(store: Store) -> None:
    put(store, 3)
    store.snapshot()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            text = store.items([2])[0].text
            assert len(store.snapshots()) == 1
            try:
                store.snapshot()
            except RequestError as error:
                os.write(writing, f"{text}|{error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"a 2 |" in (said := os.read(reading, 1000)), said
    assert b"written by the process that opened it" in said
    put(store, 3, "b")
    assert store.size == 6


def _look(view: object) -> tuple[int, float, str]:
    assert not isinstance(view, Store) or view.size
    first = view.ids()[:1]  # type: ignore[attr-defined]
    return view.size, float(view.vectors().sum()), view.items(first)[0].key  # type: ignore[attr-defined]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_see_the_moment_of_the_reader_that_they_were_given(
    store: Store, start: str
) -> None:
    put(store, 3)
    reader = Store.open(store.path)
    put(store, 3, "b")
    store.forget([1])
    with multiprocessing.get_context(start).Pool(1) as pool:
        size, total, key = pool.apply(_look, (reader,))
    assert (size, key) == (2, "a/0")
    assert total == pytest.approx(float(unit(3, 3)[[0, 2]].sum()))
    assert pickle.loads(pickle.dumps(store)).size == 5


def test_a_reader_stays_where_it_is_while_the_writer_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "FAN", 2)
    put(store, 3)
    store.set_column("group", [0], [1])
    store.set_scores("gain", [0], [0.5], version="v")
    reader = Store.open(store.path)
    for i in range(5):
        put(store, 2, f"b{i}")
        store.set_column("group", [0], [i + 2])
        store.set_scores("gain", [0], [i], version="v")
    assert reader.size == 3
    assert reader.column("group").tolist() == [1, -1, -1]
    assert reader.scores("gain")[0] == 0.5
    assert reader.items(reader.ids()) == texts(3, "a")
    np.testing.assert_array_equal(reader.vectors(), unit(3, 3))
    reader.refresh()
    assert reader.size == store.size == 13
    assert reader.column("group")[0] == 6
    with pytest.raises(RequestError, match="write=True"):
        reader.snapshot()


def test_a_reader_whose_items_are_forgotten_loses_them(store: Store) -> None:
    put(store, 3)
    reader = Store.open(store.path)
    store.forget([1])
    with pytest.raises(RequestError, match="1 of 1 ids are not in the store"):
        reader.items([1])
    assert reader.ids().tolist() == [0, 2]


def test_scores_that_a_compaction_took_are_no_other_scores(store: Store) -> None:
    put(store, 2)
    store.set_scores("gain", [0], [0.25], version="v")
    snapshot = store.snapshot()
    store.set_scores("gain", [0], [0.5], version="v")
    reader = Store.open(store.path)
    store.set_scores("gain", [0], [0.75], version="v")
    path = store.path
    store.close()
    compact(path)
    with pytest.raises(RunError, match="compacted since this reader"):
        reader.scores("gain")
    reader.refresh()
    assert reader.scores("gain")[0] == 0.75
    assert reader.at(snapshot).scores("gain")[0] == 0.25
    with Store.open(path, write=True) as again:
        assert len(again.lineage(0)) == 3


def test_compaction_joins_what_forgetting_left_small(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", dim=DIM, shard=300) as store:
        for i in range(12):
            put(store, 4, f"n{i}")
        kept = store.ids()[::6].copy()
        store.forget(np.setdiff1d(store.ids(), kept))
        before = store.items(kept), store.vectors(kept).copy()
        shards = len(store._state.of("payload"))
    assert compact(tmp_path / "s") > 0
    with Store.open(tmp_path / "s", write=True) as store:
        assert len(store._state.of("payload")) < shards
        assert store.items(kept) == before[0]
        np.testing.assert_array_equal(store.vectors(kept), before[1])
        put(store, 4, "after")
    assert check(tmp_path / "s") == []


def test_a_store_that_may_not_be_written_can_be_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk mounted read-only, say: SQLite would want to make its journal there."""
    put(store, 3)
    store.snapshot("one")
    store.close()
    path = store.path.rename(tmp_path / "odd ?#% name")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert check(path) == []
    with Store.open(path) as view:
        assert len(view.items(view.ids())) == 3
        assert [s.label for s in view.snapshots()] == ["one"]
        handle = view._catalogue_to_read()
        with handle.transaction("read") as connection:
            query = connection.engine.url.query
        assert query["immutable"] == "1"
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_backup_is_a_store_of_its_own(store: Store, tmp_path: Path) -> None:
    put(store, 3, cursor=4)
    store.snapshot("s")
    backup(store.path, tmp_path / "copy")
    store.forget([0])
    put(store, 3, "b")
    with Store.open(tmp_path / "copy", write=True) as copy:
        assert copy.items(copy.ids()) == texts(3, "a")
        assert (copy.sources(), copy.at(1).size) == ({"src": 4}, 3)
        copy.append(texts(5, "c"), None, source="src")
        copy.forget([1])
    assert store.items([1])[0] == texts(3, "a")[1]
    assert check(tmp_path / "copy") == check(store.path) == []
    with pytest.raises(RequestError, match="already and not empty"):
        backup(store.path, tmp_path / "copy")
    with pytest.raises(RequestError, match="inside the store"):
        backup(store.path, store.path / "copy")


def test_a_backup_lacks_what_was_being_forgotten(store: Store, tmp_path: Path) -> None:
    put(store, 3)
    store.close()
    connection = sqlite3.connect(store.path / catalogue.FILE)
    with connection:  # as a writer leaves it that dies between its two steps
        connection.execute("INSERT INTO forgetting VALUES (1, 0)")
    connection.close()
    backup(store.path, tmp_path / "copy")
    assert check(tmp_path / "copy") == []
    with Store.open(tmp_path / "copy") as copy:
        assert copy.ids().tolist() == [0, 2]
    assert any("still to be forgotten" in text for text in check(store.path))


def test_a_backup_catches_up_with_a_busy_writer(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "FAN", 2)
    put(store, 3)
    usual, calls = copying._one, 0

    def beside(folder: Path, aside: Path, part: catalogue.Part) -> None:
        nonlocal calls
        calls += 1
        if calls <= 60:
            added = put(store, 2, f"n{calls}")
            store.set_column("group", added.ids, [1, 1])
            store.forget(added.ids[:1])
        usual(folder, aside, part)

    monkeypatch.setattr(copying, "_one", beside)
    backup(store.path, tmp_path / "copy")
    assert calls > 60
    assert check(tmp_path / "copy") == check(store.path) == []
    with Store.open(tmp_path / "copy") as copy:
        assert copy.size == store.size == 63
        np.testing.assert_array_equal(copy.vectors(copy.ids()), store.vectors(store.ids()))


def test_together_is_one_change_or_none(store: Store) -> None:
    with store.together("round 1"):
        ids = put(store, 3).ids
        store.set_scores("gain", ids, [1, 2, 3], version="v")
        assert Store.open(store.path).size == 0
        assert store.scores("gain").tolist() == [1, 2, 3]
        assert store.items(ids) == texts(3, "a")
    assert Store.open(store.path).size == 3

    def fails() -> None:
        with store.together():
            put(store, 3, "b")
            raise KeyError("a caller's own error")

    with pytest.raises(KeyError):
        fails()

    def misses_a_file() -> None:
        with store.together():
            put(store, 3, "b")
            (store.path / "no such file").read_bytes()

    with pytest.raises(FileNotFoundError, match="no such file"):  # not the store's failure
        misses_a_file()
    assert store.size == 3
    assert put(store, 2, "b").ids.tolist() == [3, 4]
    assert check(store.path) == []


def test_creating_and_opening_refuse_what_is_not_theirs(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(RequestError, match="not empty"):
        Store.create(tmp_path / "full", dim=DIM)
    for dim in (0, 2.5, True):
        with pytest.raises(RequestError, match="dim must be"):
            Store.create(tmp_path / "s", dim=dim)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match='did you mean "float32"'):
        Store.create(tmp_path / "s", dim=1, dtype="float23")
    for write in (False, True):
        with pytest.raises(RunError, match="there is no store"):
            Store.open(tmp_path / "none", write=write)
    assert not (tmp_path / "none").exists()
    with pytest.raises(RunError, match="there is no store"):
        check(tmp_path / "none")


def _format(path: Path, value: int) -> None:
    with sqlite3.connect(path / catalogue.FILE) as connection:
        connection.execute("UPDATE setting SET value = ? WHERE name = 'format'", [str(value)])
    connection.close()


def test_a_newer_format_is_refused_and_an_older_one_brought_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 2)
    path = store.path
    store.close()
    _format(path, catalogue.FORMAT + 1)
    for open_ in (Store.open, lambda p: Store.open(p, write=True), check):
        with pytest.raises(RunError, match=r"newer version of sparing wrote it: upgrade"):
            open_(path)
    _format(path, catalogue.FORMAT - 1)
    with pytest.raises(RunError, match="open it once for writing"):
        Store.open(path)
    done = []
    monkeypatch.setitem(catalogue.MIGRATIONS, catalogue.FORMAT - 1, done.append)
    with Store.open(path, write=True) as opened:
        assert opened.items(opened.ids()) == texts(2, "a")
    assert len(done) == 1
    assert Store.open(path).size == 2


def test_memory_an_item_is_small(tmp_path: Path) -> None:
    """What a writer holds besides vectors: at most 45 bytes an item."""
    n, dim = 20_000, 1
    with Store.create(tmp_path / "s", dim=dim) as store:
        for start in range(0, n, 5_000):
            items = [Item(key=str(i), text=str(i)) for i in range(start, start + 5_000)]
            store.append(items, Vectors(main=np.ones((5_000, dim), np.float32)), source="s")
        hashes, named = store._lookups()
        held = sum(array.all.nbytes for array in store._grown) + hashes.bytes + named.bytes
        assert held / n <= 45


def test_importing_the_store_is_light() -> None:
    heavy = ("sqlalchemy", "pyarrow", "sqlite3")
    code = f"import sys, sparing.pool.store; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout == "[]\n", said


@pytest.mark.parametrize("package", ["sqlalchemy", "pyarrow"])
def test_a_missing_package_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    used = {"sqlalchemy": lambda: Store.open(store.path), "pyarrow": lambda: put(store, 1)}
    with pytest.raises(RequestError, match=rf'"{package}".*pip install "sparing\[pool\]"'):
        used[package]()
    monkeypatch.undo()
    assert store.size == 0
    assert put(store, 1).ids.tolist() == [0]
