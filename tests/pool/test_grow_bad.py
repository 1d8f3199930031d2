"""``sparing grow`` with what is wrong around it: interrupts, links, places, newer stores."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from tests.pool.made_sources import lines, picture
from tests.pool.test_grow_command import noise
from typer.testing import CliRunner

from sparing.cli import app
from sparing.pool.growth import Growth
from sparing.pool.store import Store, check


def call(*arguments: Any) -> Result:
    made = [str(argument) for argument in ("grow", *arguments, "--quiet", "--no-report")]
    return CliRunner().invoke(app, made)


def folder(path: Path, n: int = 40) -> Path:
    path.mkdir()
    for number in range(n):
        (path / f"{number:02d}.png").write_bytes(noise(number % 30))
    return path


def held(store: Path) -> dict[str, Any]:
    with Store.open(store) as view:
        return {
            "keys": view.column("key").tolist(),
            "reasons": view.column("reason").tolist(),
            "gains": np.nan_to_num(view.scores("gain"), nan=-1).tolist(),
            "drops": [(drop.key, drop.reason) for drop in view.drops()],
        }


@pytest.mark.parametrize("where", ["before", "within", "behind"])
def test_an_interrupt_ends_in_a_word_and_the_same_command_goes_on(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # what runs in the background of a shell ignores it
    held_by = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, held_by))
    source, store = folder(tmp_path / "images"), tmp_path / "pool"
    assert call(tmp_path / "whole", source, "--batch", 8).exit_code == 0
    usual, calls = Growth.add if where != "within" else Store.append, 0

    def interrupted(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and where == "before":
            signal.raise_signal(signal.SIGINT)
        found = usual(*given, **more)
        if calls == 3 and where != "before":
            signal.raise_signal(signal.SIGINT)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Store if where == "within" else Growth, usual.__name__, interrupted)
        stopped = call(store, source, "--batch", 8)
    assert stopped.exit_code == 1
    assert "interrupted; go on with the same command" in stopped.output
    assert check(store) == []
    with Store.open(store) as view:
        assert 0 < view.size < 30
    assert call(store, source, "--batch", 8).exit_code == 0
    assert held(store) == held(tmp_path / "whole")


def test_a_link_to_itself_leaves_the_other_images(tmp_path: Path) -> None:
    source = folder(tmp_path / "images", 5)
    (source / "self.png").symlink_to("self.png")
    (source / "round").symlink_to(source)
    os.mkfifo(source / "pipe.png")
    assert call(tmp_path / "pool", source).exit_code == 0
    found = held(tmp_path / "pool")
    assert len(found["keys"]) == 5
    assert found["drops"] == [("pipe.png", "unreadable"), ("self.png", "unreadable")]


def test_an_encoders_name_is_not_a_folder_that_happens_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "images", 3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pixels").mkdir()
    assert call("pool", "images").exit_code == 0
    assert call(tmp_path / "pool", source).exit_code == 0  # the same, by its whole path
    with Store.open(tmp_path / "pool") as view:
        assert (view.size, view.drops()) == (3, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--index", "x"], "unknown kind of index"),
        (["--budget", 0], "--budget must be at least 1"),
        (["--threshold", "nan"], "copies must be in [-1, 2], got nan"),
        (["--threshold", -7], "copies must be in [-1, 2]"),
        (["--encoder", "pixel"], 'did you mean "pixels"'),
    ],
)
def test_wrong_options_make_no_store(options: list[Any], message: str, tmp_path: Path) -> None:
    said = call(tmp_path / "pool", folder(tmp_path / "images", 2), *options)
    assert said.exit_code == 2
    assert message in said.output
    assert not (tmp_path / "pool").exists()


def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    source = folder(tmp_path / "images", 3)
    assert call(tmp_path / "pool", source).exit_code == 0
    file = tmp_path / "pool" / "catalogue.sqlite"
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE setting SET value = '99' WHERE name = 'format'")
    connection.close()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").rglob("*.bin")}
    for arguments in (("grow", tmp_path / "pool", source), ("pool", "check", tmp_path / "pool")):
        said = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert said.exit_code == 1
        assert "a newer version of sparing wrote it" in said.output
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").rglob("*.bin")}


def test_an_image_of_many_frames_counts_once_and_strange_modes_are_taken(tmp_path: Path) -> None:
    from PIL import Image

    source = tmp_path / "images"
    source.mkdir()
    frames = [Image.new("RGB", (20, 20), (9 * i, 200, 255 - 9 * i)) for i in range(25)]
    frames[0].save(source / "many.gif", save_all=True, append_images=frames[1:])
    deep = (np.arange(400).reshape(20, 20) * 160).astype(np.uint16)
    Image.fromarray(deep).save(source / "deep.png")
    for number, mode in enumerate(("CMYK", "LAB", "YCbCr")):
        Image.new("RGB", (20, 20), (40 * number, 9, 99)).convert(mode).save(source / f"{mode}.tif")
    for mode in ("P", "1", "LA", "RGBA"):
        Image.new("RGB", (20, 20), (9, 99, 200)).convert(mode).save(source / f"{mode}.png")
    (source / "words.jpg").write_text("no image")
    (source / "empty.jpg").write_bytes(b"")
    assert call(tmp_path / "pool", source, "--threshold", -1).exit_code == 0
    found = held(tmp_path / "pool")
    assert len(found["keys"]) == 9
    assert found["drops"] == [("empty.jpg", "unreadable"), ("words.jpg", "unreadable")]


def test_names_of_any_bytes_become_keys(tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for number, name in enumerate(("日本 🎉.png", "a\nb\t<i>.png", "a\u0301.png")):
        (source / name).write_bytes(picture(number))
    (source / os.fsdecode(b"\xff\xfe.png")).write_bytes(picture(9))
    drops = tmp_path / "drops.jsonl"
    assert call(tmp_path / "pool", source, "--threshold", -1, "--drops", drops).exit_code == 0
    keys = ["a\nb\t<i>.png", "a\u0301.png", "\\udcff\\udcfe.png", "日本 🎉.png"]
    assert sorted(held(tmp_path / "pool")["keys"]) == sorted(keys)


def test_labels_of_lines_that_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    wrong = ["cat", float("nan"), 1.5, True, [1], -1, 2**40]
    rows = [{"image": "a.png", "label": label} for label in (*wrong, 3)]
    assert call(tmp_path / "pool", lines(tmp_path / "a.jsonl", rows)).exit_code == 0
    with Store.open(tmp_path / "pool") as view:
        assert view.column("label").tolist() == [3]
        details = [drop.detail for drop in view.drops()]
    assert len(details) == len(wrong)
    assert all("the label" in detail for detail in details), json.dumps(details)
