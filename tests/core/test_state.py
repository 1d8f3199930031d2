from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparing.core import state
from sparing.core.errors import RequestError, RunError
from sparing.core.state import Checkpoints, atomic_write_json, atomic_write_text, load, read, save


def same(a: object, b: object) -> bool:
    """Equal in structure, type and bits: NaN equals itself, 0.0 is not -0.0."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return raw[0].equal(raw[1])
    if type(a) is not type(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


dtypes = st.sampled_from(
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.uint16, torch.uint32, torch.uint64,
    ]
)  # fmt: skip


@st.composite
def tensors(draw):
    dtype, shape = draw(dtypes), draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype == torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).clone().reshape(shape)


keys = st.text(max_size=6) | st.sampled_from(["$tensor", "$dict", "a/b", "__metadata__", "a#2"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars | tensors(),
    lambda t: (
        st.lists(t, max_size=3)
        | st.lists(t, max_size=3).map(tuple)
        | st.dictionaries(keys, t, max_size=3)
        | st.dictionaries(
            st.integers() | keys | st.none() | st.tuples(st.integers(), keys), t, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_tree_survives_bit_for_bit(tree):
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory) / "s", tree, meta={"step": 3})
        saved = read(Path(directory) / "s")
    assert same(saved.tree, tree)
    assert saved.meta == {"step": 3}


def test_views_become_independent_copies(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tree = {
        "base": base,
        "row": base[1],
        "t": base.t(),
        "again": base,
        "wide": base[:1].expand(5, 4),
    }
    save(tmp_path / "s", tree)
    back = load(tmp_path / "s")
    assert same(back, {name: tensor.contiguous() for name, tensor in tree.items()})
    back["base"].zero_()
    assert back["row"].equal(base[1])
    assert back["again"].equal(base)
    # a view of a large storage does not take the storage along
    save(tmp_path / "v", torch.zeros(1_000_000)[:2])
    assert (tmp_path / "v" / state.TENSORS).stat().st_size < 1000


def test_names_that_would_collide_are_kept_apart(tmp_path):
    tree = {"a": {"b": torch.tensor(1)}, "a/b": torch.tensor(2), 0: torch.tensor(3)}
    tree["0"] = torch.tensor(4)
    save(tmp_path / "s", tree)
    assert same(load(tmp_path / "s"), tree)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_and_a_generator_continue_exactly(tmp_path, optimizer):
    def steps(count, model, built, generator):
        for _ in range(count):
            built.zero_grad()
            model(torch.randn(4, 3, generator=generator)).square().sum().backward()
            built.step()

    def fresh():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Linear(3, 2)
        return model, optimizer(model.parameters(), lr=0.1), torch.Generator().manual_seed(5)

    model, built, generator = fresh()
    steps(2, model, built, generator)
    tree = {"model": model.state_dict(), "opt": built.state_dict(), "rng": generator.get_state()}
    save(tmp_path / "s", tree)
    steps(3, model, built, generator)

    other, rebuilt, regenerator = fresh()
    back = load(tmp_path / "s")
    other.load_state_dict(back["model"])
    rebuilt.load_state_dict(back["opt"])
    regenerator.set_state(back["rng"])
    steps(3, other, rebuilt, regenerator)
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert same(built.state_dict(), rebuilt.state_dict())


class Point(NamedTuple):
    x: int


def test_kinds_of_dict_and_tuple_become_plain(tmp_path):
    save(
        tmp_path / "s",
        {"o": OrderedDict(b=1, a=2), "p": Point(1), "n": nn.Parameter(torch.ones(2))},
    )
    back = load(tmp_path / "s")
    assert list(back["o"]) == ["b", "a"]
    assert type(back["o"]) is dict
    assert back["p"] == (1,)
    assert type(back["p"]) is tuple
    assert not back["n"].requires_grad
    assert type(back["n"]) is torch.Tensor


@pytest.mark.parametrize(
    "bad",
    [
        {1, 2}, b"x", object(), nn.Linear(1, 1), torch.float32, lambda: None, 1j,
        torch.eye(2).to_sparse(), torch.ones(1, device="meta"), {torch.ones(1): 1},
    ],
)  # fmt: skip
def test_what_is_not_state_is_refused_with_its_place(tmp_path, bad):
    save(tmp_path / "s", 1)
    with pytest.raises(RequestError, match=r'cannot save a .* at "m/0(/\(key\))?" of a state'):
        save(tmp_path / "s", {"m": [bad]})
    assert load(tmp_path / "s") == 1


def test_meta_holds_no_tensors(tmp_path):
    with pytest.raises(TypeError, match="meta holds no tensors"):
        save(tmp_path / "s", {}, meta={"t": torch.ones(1)})


def test_the_files_are_what_the_format_says(tmp_path):
    save(tmp_path / "s", {"a": torch.ones(2), "b": math.nan})
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "state.json",
        "tensors.safetensors",
    ]
    body = json.loads((tmp_path / "s" / "state.json").read_text())
    assert body["format"] == 1
    assert body["tree"] == {"a": {"$tensor": "a"}, "b": {"$float": "nan"}}
    assert body["tensors"]["bytes"] == (tmp_path / "s" / "tensors.safetensors").stat().st_size


# ---- damage ----------------------------------------------------------------------------------

FULL = {"w": torch.arange(40.0), "step": 7, "lr": 0.125, "tag": "x", 3: (1, math.inf)}


def rewrite(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name", [state.TENSORS, state.JSON])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_an_error(tmp_path, name, part):
    save(tmp_path / "s", FULL)
    rewrite(tmp_path / "s" / name, lambda raw: raw[: int(len(raw) * part)])
    with pytest.raises(RunError, match=f"damaged or cut short .*{name}.*delete this directory"):
        load(tmp_path / "s")


@pytest.mark.parametrize("name", [state.TENSORS, state.JSON])
def test_a_flipped_byte_anywhere_is_an_error_or_harmless(tmp_path, name):
    save(tmp_path / "s", FULL)
    path = tmp_path / "s" / name
    good = path.read_bytes()
    caught = 0
    for position in range(len(good)):
        raw = bytearray(good)
        raw[position] ^= 1 << (position % 8)
        path.write_bytes(raw)
        try:
            back = load(tmp_path / "s")
        except RunError:
            caught += 1
        else:
            assert same(back, FULL)
    assert caught == len(good)


@pytest.mark.parametrize("name", [state.TENSORS, state.JSON])
def test_a_missing_file_is_named(tmp_path, name):
    save(tmp_path / "s", FULL)
    (tmp_path / "s" / name).unlink()
    with pytest.raises(RunError, match=f"{name} is missing"):
        load(tmp_path / "s")


@pytest.mark.parametrize("body", ["[]", "{}", '{"format": "1"}', "[" * 100_000, '{"format": 1}'])
def test_json_of_another_kind_is_an_error(tmp_path, body):
    save(tmp_path / "s", FULL)
    (tmp_path / "s" / state.JSON).write_text(body)
    with pytest.raises(RunError, match="damaged or cut short"):
        load(tmp_path / "s")


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "other"}, {"$tuple": 3}, {"$float": "one"}, {"$dict": [[1]]}, {"$bytes": {}},
        {"$bytes": {"name": "w", "dtype": "nonsense", "shape": [1]}}, {"$dict": [[[], 1]]},
    ],
)  # fmt: skip
def test_a_tree_that_fits_its_checksum_but_makes_no_sense_is_an_error(tmp_path, tree):
    save(tmp_path / "s", FULL)
    path = tmp_path / "s" / state.JSON
    body = json.loads(path.read_text())
    body["tree"] = tree
    del body["sha256"]
    path.write_text(json.dumps({**body, "sha256": state._sha256(state._dump(body))}))
    with pytest.raises(RunError, match="damaged or cut short"):
        load(tmp_path / "s")


def test_a_newer_format_says_to_upgrade(tmp_path):
    save(tmp_path / "s", FULL)
    path = tmp_path / "s" / state.JSON
    path.write_text(path.read_text().replace('"format":1', '"format":2', 1))
    with pytest.raises(RunError, match=r"format 2, and this version reads up to 1.*upgrade"):
        load(tmp_path / "s")


def test_a_missing_state_is_an_error_and_makes_nothing(tmp_path):
    with pytest.raises(RunError, match=r"no saved state at .*nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"no saved state at .*file"):
        load(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- failures while writing --------------------------------------------------------------------


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
    checkpoints.write(12, FULL)
    rewrite(tmp_path / "c" / "step-00000012" / state.TENSORS, lambda raw: raw[:-1])
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
