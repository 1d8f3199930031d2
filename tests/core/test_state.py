from __future__ import annotations

import json
import math
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
from sparing.core.state import load, read, save


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
