"""Whatever happens while a state is written, the previous one survives."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparing.core import state
from sparing.core.errors import RunError
from sparing.core.state import Checkpoints, atomic_write_json, atomic_write_text, load, save


class Faults:
    """While armed, makes the n-th call of the functions that touch the disk find it full."""

    CALLS = (
        (os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "open"),
        (state, "save_file"), (state, "_write"), (state, "_fingerprint"),
    )  # fmt: skip

    def __init__(self, monkeypatch, fail_at: int) -> None:
        self.left = fail_at
        self.hit = ""
        self.armed = False
        for owner, name in self.CALLS:
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))

    def wrap(self, name, function):
        def faulty(*args, **kwargs):
            self.left -= self.armed
            if self.armed and self.left == 0:
                self.hit = name
                if name == "save_file":  # a full disk leaves part of the file
                    Path(args[1]).write_bytes(b"\x10\x00\x00")
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return faulty

    def __enter__(self) -> None:
        self.armed = True

    def __exit__(self, *_: object) -> None:
        self.armed = False


def fail_everywhere(action) -> list[str]:
    """Run ``action`` failing at its first disk call, then its second, until it gets through."""
    hits: list[str] = []
    messages: list[str] = []
    for number in range(1, 60):
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, number)
            try:
                action(number, faults)
            except RunError as error:
                messages.append(str(error))
            else:
                if not faults.hit:
                    break
            hits.append(faults.hit)
    else:
        raise AssertionError("never got through")
    assert messages
    assert all("No space left on device" in text and "is kept" in text for text in messages)
    return hits


def test_a_full_disk_at_any_point_leaves_the_previous_state(tmp_path):
    path = tmp_path / "s"
    save(path, {"w": torch.zeros(3), "n": 0})
    seen = []

    def action(number, full):
        before = load(path)["n"]
        try:
            with full:
                save(path, {"w": torch.full((3,), float(number)), "n": number})
        finally:
            back = load(path)
            assert back["n"] in (before, number)
            assert back["w"].eq(back["n"]).all()
            seen.append(back["n"])

    hits = fail_everywhere(action)
    assert {"replace", "fsync", "mkdir", "save_file", "_write", "open"} <= set(hits)
    assert hits.count("replace") >= 2
    assert seen[-1] == len(seen)
    assert len(set(seen)) < len(seen)  # some failed before the new one was in place
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_a_full_disk_at_any_point_leaves_the_previous_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.write(0, {"w": torch.zeros(3)}, {"n": 0})

    def action(number, full):
        before = checkpoints.newest()[0]
        try:
            with full:
                checkpoints.write(number, {"w": torch.full((3,), float(number))}, {"n": number})
        finally:
            step, tree, meta = checkpoints.newest()
            assert step in (before, number)
            assert tree["w"].eq(step).all()
            assert meta == {"n": step}

    hits = fail_everywhere(action)
    assert len(hits) >= 8
    assert [p.name for p in (tmp_path / "c").iterdir()] == [f"step-{len(hits) + 1:08d}"]


def test_a_full_disk_at_any_point_leaves_the_previous_text(tmp_path):
    path = tmp_path / "t.json"
    atomic_write_json(path, {"n": 0})

    def action(number, full):
        before = json.loads(path.read_text())["n"]
        try:
            with full:
                atomic_write_json(path, {"n": number})
        finally:
            assert json.loads(path.read_text())["n"] in (before, number)

    assert len(fail_everywhere(action)) >= 4
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_an_interrupt_while_writing_cleans_up(tmp_path, monkeypatch):
    save(tmp_path / "s", 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "s", 2)
    assert load(tmp_path / "s") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_text_is_written_and_replaced(tmp_path):
    path = tmp_path / "deep" / "t.txt"
    atomic_write_text(path, "one\n")
    atomic_write_text(path, "zwei\nä\n")
    assert path.read_bytes() == "zwei\nä\n".encode()
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        atomic_write_json(path, math.nan)
    assert path.read_bytes() == "zwei\nä\n".encode()


# ---- leftovers of a killed writer ---------------------------------------------------------------


def test_leftovers_of_a_killed_writer_are_ignored_and_cleaned(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.write(3, {"n": 3})
    checkpoints.write(5, {"n": 5})
    for leftover in (".step-00000007.writing", ".step-00000003.writing"):
        (tmp_path / "c" / leftover).mkdir()
        (tmp_path / "c" / leftover / state.TENSORS).write_bytes(b"half")
    (tmp_path / "c" / "notes.txt").write_text("mine")
    assert checkpoints.newest() == (5, {"n": 5}, None)
    checkpoints.write(7, {"n": 7})
    assert checkpoints.newest() == (7, {"n": 7}, None)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["notes.txt", "step-00000007"]


def test_a_writer_killed_between_its_two_renames_loses_nothing(tmp_path):
    save(tmp_path / "s", {"n": 1})
    (tmp_path / "s").rename(tmp_path / ".s.previous")
    assert load(tmp_path / "s") == {"n": 1}
    save(tmp_path / "s", {"n": 2})
    assert load(tmp_path / "s") == {"n": 2}
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.write(4, {"n": 4})
    (tmp_path / "c" / "step-00000004").rename(tmp_path / "c" / ".step-00000004.previous")
    assert checkpoints.newest() == (4, {"n": 4}, None)
    checkpoints.write(4, {"n": 5})
    assert checkpoints.newest() == (4, {"n": 5}, None)
    assert sorted(p.name for p in tmp_path.rglob("*.previous")) == []


def test_no_checkpoint_is_none_and_a_damaged_one_is_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.newest() is None
    checkpoints.write(12, {"w": torch.arange(40.0)})
    path = tmp_path / "c" / "step-00000012" / state.TENSORS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match="step-00000012 is damaged or cut short"):
        checkpoints.newest()


def test_an_older_survivor_beside_a_damaged_one_is_used_with_a_warning(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(tmp_path / "c" / "step-00000001", {"n": 1})
    save(tmp_path / "c" / "step-00000002", {"n": 2})
    (tmp_path / "c" / "step-00000002" / state.JSON).write_text("{")
    with pytest.warns(RuntimeWarning, match="step-00000002 is damaged.*Going on from step 1"):
        assert checkpoints.newest() == (1, {"n": 1}, None)


# ---- real kills and a real full disk -------------------------------------------------------------


def driver(name: str, *arguments: object) -> str:
    script = Path(__file__).with_name("killed_writer.py")
    done = subprocess.run(
        [sys.executable, str(script), name, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kill_nine_at_every_disk_call_and_at_random_moments_loses_nothing(tmp_path):
    report = json.loads(driver("kill", tmp_path))
    assert report["stages"] >= 12  # every call was a place of death once
    assert report["random"] >= 5
    assert report["old"] > 0
    assert report["new"] > 0


def test_a_write_that_the_system_cuts_off_leaves_the_previous_checkpoint(tmp_path):
    report = json.loads(driver("limit", tmp_path))
    assert "could not write" in report["error"]
    assert report["value"] == 1
    assert report["files"] == ["step-00000001"]
