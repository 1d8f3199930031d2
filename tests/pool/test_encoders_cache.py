"""The cache of vectors: hits, bounds, versions, forgetting on the disk, broken files."""

from __future__ import annotations

import pickle
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sparing.core.errors import RequestError, RunError
from sparing.pool.encoders import UnreadableError, encode, encoder
from sparing.pool.encoders.cache import Cached, fingerprint
from sparing.pool.items import Item, Vectors


def test_any_encoder_takes_a_cache(tmp_path: Path) -> None:
    pixels = encoder("pixels", cache=tmp_path / "vectors.sqlite")
    assert isinstance(pixels, Cached)
    items = [Item(key="a", tensor=np.arange(48, dtype=np.float32).reshape(3, 4, 4))]
    first = encode(pixels, items)
    again = encoder("pixels", cache=tmp_path / "vectors.sqlite")
    np.testing.assert_array_equal(encode(again, items).vectors.main, first.vectors.main)
    assert isinstance(again, Cached)
    assert (again.hits, again.misses) == (1, 0)


class Counting:
    dim = 3

    def __init__(self, version: str = "v1", second: bool = False) -> None:
        self.version, self.second = version, second
        self.seen: list[str] = []

    def __call__(self, items: Sequence[Item]) -> Vectors:
        bad = {at: "broken" for at, item in enumerate(items) if item.text == "bad"}
        if bad:
            raise UnreadableError(bad)
        self.seen += [item.text or "" for item in items]
        rows = np.array([[len(i.text or ""), 1, 2] for i in items], np.float32).reshape(-1, 3)
        return Vectors(main=rows, second=rows + 1 if self.second else None)


def texts(*values: str) -> list[Item]:
    return [Item(key=f"k{at}", text=value, label=at) for at, value in enumerate(values)]


@pytest.mark.parametrize("disk", [False, True])
def test_each_content_is_encoded_once(disk: bool, tmp_path: Path) -> None:
    inner = Counting(second=True)
    made = Cached(inner, tmp_path / "deep" / "cache.sqlite" if disk else None)
    first = made(texts("a", "bb", "a", "a"))
    assert inner.seen == ["a", "bb"]
    again = made(texts("ccc", "bb", "a"))
    assert inner.seen == ["a", "bb", "ccc"]
    assert (made.hits, made.misses) == (4, 3)
    assert first.main[:, 0].tolist() == [1, 2, 1, 1]
    assert again.main[:, 0].tolist() == [3, 2, 1]
    assert again.second is not None
    np.testing.assert_array_equal(again.second, again.main + 1)
    assert made([]).main.shape == (0, 3)
    made.close()


def test_vectors_outlive_the_process_but_not_another_version(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    Cached(Counting(), path)(texts("a", "bb"))
    other = Counting()
    pickled = pickle.loads(pickle.dumps(Cached(other, path)))
    pickled(texts("bb", "a"))
    assert pickled.encoder.seen == []
    newer = Counting("v2")
    Cached(newer, path)(texts("a"))
    assert newer.seen == ["a"]


def test_at_most_so_many_are_kept_and_the_first_go() -> None:
    inner = Counting()
    made = Cached(inner, entries=3)
    for value in ("a", "b", "c", "d"):
        made(texts(value))
    assert len(made) == 3
    made(texts("d", "c", "b"))
    assert len(inner.seen) == 4
    made(texts("a"))
    assert len(inner.seen) == 5
    wide = made(texts(*"efghijk"))
    assert wide.main.shape == (7, 3)
    assert len(made) == 3


def test_forgetting_reaches_the_bytes_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    made = Cached(Counting(), path)
    items = [Item(key="", text="x" * n) for n in range(1, 40)]
    made(items)
    key = fingerprint(items[6])
    assert key in path.read_bytes() + Path(f"{path}-wal").read_bytes()
    assert made.forget([key, b"unknown"]) == 1
    assert made.forget_items(items[7:9]) == 2
    assert len(made) == 36
    left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert key not in left
    assert fingerprint(items[8]) not in left
    assert fingerprint(items[9]) in left


def test_what_cannot_be_read_is_told_at_its_own_place_and_for_each_copy() -> None:
    made = Cached(Counting())
    made(texts("good"))
    found = encode(made, texts("good", "bad", "new", "bad"))
    assert found.rows.tolist() == [0, 2]
    assert [drop.key for drop in found.drops] == ["k1", "k3"]


def test_a_fingerprint_is_of_what_an_encoder_sees() -> None:
    base = Item(key="a", text="one", image=b"two", label=1)
    assert fingerprint(base) == fingerprint(Item(key="b", text="one", image=b"two"))
    others = [
        Item(key="a", text="one"),
        Item(key="a", image=b"one"),
        Item(key="a", text="onetwo"),
        Item(key="a", tensor=np.zeros((2, 3), np.float32)),
        Item(key="a", tensor=np.zeros((3, 2), np.float32)),
        Item(key="a", tensor=np.zeros((2, 3), np.int32)),
        base,
    ]
    assert len({fingerprint(item) for item in others}) == len(others)
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert fingerprint(Item(key="", tensor=turned)) == fingerprint(
        Item(key="", tensor=turned.copy(order="C"))
    )


def test_files_that_are_no_cache_are_told(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"no database, only words" * 100)
    with pytest.raises(RequestError, match="no cache of vectors"):
        Cached(Counting(), tmp_path / "junk")(texts("a"))
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version = 9")
    newer.close()
    with pytest.raises(RequestError, match="format 9"):
        Cached(Counting(), tmp_path / "newer")(texts("a"))


def test_a_full_disk_is_told() -> None:
    made = Cached(Counting())
    made(texts("a"))
    made._db().execute("PRAGMA max_page_count = 1")
    with pytest.raises(RunError, match="free its disk"):
        made([Item(key="", text="y" * n) for n in range(3000)])
