"""Any source goes on from any cursor as if it had never stopped, or tells what changed."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tests.pool.made_sources import everything, lines, pairs, picture, restarted, tar

from sparing.core.errors import RequestError
from sparing.pool.sources import Reading, open_source


def folder(path: Path) -> Path:
    for number in range(23):
        place = path / "images" / f"class-{number % 3}" / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(number) if number % 7 else b"no image")
    return path / "images"


def jsonl(path: Path) -> Path:
    place = lines(path / "a.jsonl", [{"text": f"text {n}", "label": n % 4} for n in range(23)])
    with open(place, "ab") as file:
        file.write(b'{"text": ""}\n\n{"text": \n{"text": "\xff"}\n{"text": "last"}')
    return place


def zipped(path: Path) -> Path:
    place = path / "b.jsonl.gz"
    place.write_bytes(gzip.compress(jsonl(path).read_bytes()))
    return place


def parquet(path: Path) -> Path:
    table = pyarrow.table({"caption": [f"text {n}" if n % 5 else "" for n in range(31)]})
    pyarrow.parquet.write_table(table, path / "c.parquet", row_group_size=7)
    return path / "c.parquet"


def webdataset(path: Path) -> Path:
    place = path / "shards"
    place.mkdir()
    for shard in range(3):
        tar(place / f"{shard}.tar", [*pairs(9), ("0009.txt", b"alone")])
    return place


def compressed(path: Path) -> Path:
    return tar(path / "d.tar.gz", pairs(11), "w:gz")


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("made", [folder, jsonl, zipped, parquet, webdataset, compressed])
def test_restarts_after_each_chunk_give_the_same(
    tmp_path: Path, made: Callable[[Path], Path], size: int
):
    place = made(tmp_path)
    items, drops = everything(open_source(place))
    assert len(items) >= 11
    assert (items, drops) == restarted(place, size)
    source = open_source(place)
    done = [chunk.done for chunk in source.chunks(size=size)]
    assert done == sorted(done)
    assert source.total / 2 < done[-1] <= source.total
    sizes = [len(chunk.items) + len(chunk.drops) for chunk in source.chunks(size=size)]
    assert all(size <= found <= size + 1 for found in sizes[:-1])


@pytest.mark.parametrize("made", [folder, jsonl, zipped, parquet, webdataset])
def test_a_source_that_is_done_gives_nothing_more(tmp_path: Path, made: Callable[[Path], Path]):
    place = made(tmp_path)
    *_, last = open_source(place).chunks()
    assert list(open_source(place).chunks(last.cursor)) == []


def cursor_of(place: Path, size: int = 5) -> dict[str, object]:
    return next(open_source(place).chunks(size=size)).cursor


def test_a_file_that_was_changed_is_told(tmp_path: Path):
    place = lines(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(9)])
    cursor = cursor_of(place)
    place.write_text(place.read_text().replace("text 3", "Text 3"))
    with pytest.raises(RequestError, match=r"a\.jsonl has other content.*--reread") as told:
        next(open_source(place).chunks(cursor))
    assert str(place) in str(told.value)
    place.write_text("")
    with pytest.raises(RequestError, match="and has now 0"):
        next(open_source(place).chunks(cursor))


def test_a_large_file_written_anew_is_told_by_its_time(tmp_path: Path):
    rows = [{"text": f"text {n:06d} {'x' * 60}"} for n in range(4000)]
    place = lines(tmp_path / "a.jsonl", rows)
    cursor = cursor_of(place)
    rows[2000]["text"] = rows[2000]["text"].replace("x", "y")
    lines(place, rows)
    os.utime(place, ns=(1, 1))
    with pytest.raises(RequestError, match="was written anew"):
        next(open_source(place).chunks(cursor))


def test_a_small_file_that_was_only_touched_goes_on(tmp_path: Path):
    place = lines(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(9)])
    cursor = cursor_of(place)
    os.utime(place, ns=(1, 1))
    assert [item.text for c in open_source(place).chunks(cursor) for item in c.items] == [
        f"text {n}" for n in range(5, 9)
    ]


def test_lines_that_were_appended_are_read(tmp_path: Path):
    place = lines(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(9)])
    *_, last = open_source(place).chunks(size=5)
    with open(place, "a") as file:
        file.write('{"text": "new"}\n')
    (chunk,) = open_source(place).chunks(last.cursor)
    assert [(item.key, item.text) for item in chunk.items] == [("a.jsonl:10", "new")]


def test_an_archive_that_grew_is_told(tmp_path: Path):
    place = tar(tmp_path / "a.tar", pairs(3))
    cursor = cursor_of(place, 1)
    tar(place, [("9.png", picture()), ("9.txt", b"new")] * 20, "a")
    with pytest.raises(RequestError, match=r"a\.tar had .* bytes and has now"):
        next(open_source(place).chunks(cursor))


def test_files_added_behind_are_read_and_files_added_before_are_told(tmp_path: Path):
    place = folder(tmp_path)
    *_, last = open_source(place).chunks()
    shutil.copy(place / "class-1/01.png", place / "zebra.png")
    (chunk,) = open_source(place).chunks(last.cursor)
    assert [item.key for item in chunk.items] == ["zebra.png"]
    (place / "aardvark.png").write_bytes(picture(99))
    with pytest.raises(RequestError, match="some were added"):
        next(open_source(place).chunks(last.cursor))
    (place / "aardvark.png").unlink()
    (place / "class-0" / "00.png").unlink()
    with pytest.raises(RequestError, match="changed since it was last read"):
        next(open_source(place).chunks(last.cursor))


def test_files_that_are_gone_are_told(tmp_path: Path):
    place = webdataset(tmp_path)
    *_, last = open_source(place).chunks()
    (place / "2.tar").unlink()
    with pytest.raises(RequestError, match=r"2\.tar is gone"):
        next(open_source(place).chunks(last.cursor))
    (place / "1.tar").unlink()
    with pytest.raises(RequestError, match="2 of its files were read, and only 1 are there"):
        next(open_source(place).chunks(last.cursor))


def test_a_file_of_the_same_size_is_told(tmp_path: Path):
    place = webdataset(tmp_path)
    *_, last = open_source(place).chunks()
    os.utime(place / "0.tar", ns=(1, 1))
    with pytest.raises(RequestError, match="written anew, renamed"):
        next(open_source(place).chunks(last.cursor))


def test_other_options_and_other_kinds_are_told(tmp_path: Path):
    place = jsonl(tmp_path)
    cursor = cursor_of(place)
    with pytest.raises(RequestError, match=r"its options was|its options were"):
        next(open_source(place, content="text").chunks(cursor))
    images = open_source(folder(tmp_path))
    with pytest.raises(RequestError, match=r"jsonl.*folder"):
        next(images.chunks(cursor))
    with pytest.raises(RequestError, match="newer version"):
        next(open_source(place).chunks({**cursor, "format": 99}))


def test_a_class_that_was_added_would_change_the_numbers(tmp_path: Path):
    place = folder(tmp_path)
    cursor = next(open_source(place, labels=True).chunks(size=5)).cursor
    (place / "a-new-class").mkdir()
    (place / "a-new-class" / "0.png").write_bytes(picture(50))
    with pytest.raises(RequestError, match=r"3 classes .* 4 classes"):
        next(open_source(place, labels=True).chunks(cursor))


def test_fingerprints(tmp_path: Path):
    place = webdataset(tmp_path)
    before = open_source(place).fingerprint()
    assert before == open_source(place).fingerprint()
    assert json.loads(json.dumps(before)) == before
    assert before["files"] == 3
    tar(place / "3.tar", pairs(2))
    assert open_source(place).fingerprint() != before


def test_options_survive_as_json():
    reading = Reading(labels=True, classes=["a", "b"])  # type: ignore[arg-type]
    assert reading.changed() == {"labels": True, "classes": ["a", "b"]}
    assert json.loads(json.dumps(reading.changed())) == reading.changed()
