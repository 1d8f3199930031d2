"""Adapters on disk: what is loaded computes what was saved, is small, and fits its base only."""

from __future__ import annotations

import json

import pytest
import torch
from models import KINDS, SMALL, batch, bert, gpt2, llama, logits, train_

from sparing.core.errors import RequestError, RunError
from sparing.weights import installed
from sparing.weights.adapters import SparseAdapter, adapt_
from sparing.weights.files import load_adapter_, save_adapter, stored_bytes
from sparing.weights.switching import disabled, switch_

every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(model, name="default", steps=3, **options):
    chosen = {"score": "random", **SMALL, **options}
    adapt_(model, SparseAdapter(**chosen), data=[batch(model)], name=name)
    return train_(model, steps).eval()


@every_kind
@pytest.mark.parametrize("pattern", ["entry", "unit"])
def test_what_is_loaded_computes_what_was_saved(kind, pattern, tmp_path):
    model = adapted(bert(), kind=kind, pattern=pattern, keep=0.5)
    expected = logits(model)
    save_adapter(model, tmp_path / "a")
    other = load_adapter_(bert(), tmp_path / "a")
    assert logits(other).equal(expected)
    assert installed.active(other) == ["default"]
    for path, part in installed.parts(model, "default").items():
        again = installed.parts(other, "default")[path]
        assert again.config() == part.config()
        for name, factor in part.named_factors():
            assert getattr(again, name).mask().equal(factor.mask())
    # and it goes on training as the original does
    assert logits(train_(other, 2)).equal(logits(train_(model, 2)))


def test_one_of_several_is_saved_and_loaded_beside_others(tmp_path):
    model = adapted(bert(), "first", kind="lora")
    first = logits(model)
    adapted(model, "second", kind="pfeiffer")
    second = logits(model)
    for name in ("first", "second"):
        save_adapter(model, tmp_path / name, name)  # "first" does not act, and has its own head
    other = load_adapter_(bert(), tmp_path / "first")
    load_adapter_(other, tmp_path / "second", "third")
    assert installed.names(other) == ["first", "third"]
    assert logits(other).equal(second)
    switch_(other, "first")
    assert logits(other).equal(first)
    with disabled(other):
        assert logits(other).equal(logits(bert()))


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.226), ("bfloat16", 0.250)])
def test_a_fifth_kept_is_stored_in_little_more_than_a_fifth(dtype, most, tmp_path):
    sizes = {}
    for keep in (1.0, 0.2):
        model = llama(hidden_act="silu").to(getattr(torch, dtype))
        options = {"targets": "all-linear", "rank": 64, "dtype": dtype}
        adapt_(model, SparseAdapter(kind="lora", keep=keep, score="random", **options))
        save_adapter(model, tmp_path / str(keep))
        kept, dense = stored_bytes(model)
        sizes[keep] = (tmp_path / str(keep) / "tensors.safetensors").stat().st_size
        assert 0 <= sizes[keep] - kept < 400  # the header
    assert kept <= most * dense
    header = 8 + 400  # of a safetensors file
    assert sizes[0.2] - header <= most * sizes[1.0]


def test_the_base_may_be_in_another_precision_but_not_another_base(tmp_path):
    save_adapter(adapted(bert(), kind="lora"), tmp_path / "a")
    load_adapter_(bert().to(torch.bfloat16), tmp_path / "a")
    # a new head is another each time that a pretrained model is loaded: the adapter brings its own
    model = bert()
    model.classifier.weight.data.normal_()
    load_adapter_(model, tmp_path / "a")
    other = bert(seed=1)
    expected = logits(other)
    with pytest.raises(RequestError, match=r"trained on another base.*any_base=True"):
        load_adapter_(other, tmp_path / "a")
    assert installed.names(other) == []
    assert logits(other).equal(expected)
    load_adapter_(other, tmp_path / "a", any_base=True)
    with pytest.raises(RequestError, match=r'no module "bert.encoder'):
        load_adapter_(gpt2(), tmp_path / "a", any_base=True)


def test_a_fingerprint_does_not_depend_on_what_was_trained_or_merged(tmp_path):
    model = adapted(bert(), "first", kind="houlsby")
    adapted(model, "second", kind="lora")
    save_adapter(model, tmp_path / "second", "second")
    assert logits(load_adapter_(bert(), tmp_path / "second")).equal(logits(model))


def test_damaged_files_and_other_places_are_refused(tmp_path):
    model = adapted(bert(), kind="lora")
    save_adapter(model, tmp_path / "a")
    with pytest.raises(RunError, match=r"no saved state"):
        load_adapter_(bert(), tmp_path / "nothing")
    weights = tmp_path / "a" / "tensors.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(RunError, match=r"damaged"):
        load_adapter_(bert(), tmp_path / "a")
    save_adapter(model, tmp_path / "a")  # over a damaged one of its own
    load_adapter_(bert(), tmp_path / "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(RequestError, match=r"holds something else"):
        save_adapter(model, tmp_path / "mine")
    with pytest.raises(RequestError, match=r'no adapter "defualt"; did you mean "default"'):
        save_adapter(model, tmp_path / "b", "defualt")


def test_a_newer_format_and_other_states_are_refused(tmp_path, monkeypatch):
    from sparing.core import state
    from sparing.weights import files

    state.save(tmp_path / "state", {"x": 1})
    with pytest.raises(RequestError, match=r"holds no adapter"):
        load_adapter_(bert(), tmp_path / "state")
    model = adapted(bert(), kind="lora")
    with monkeypatch.context() as patch:
        patch.setattr(files, "FORMAT", 2)
        save_adapter(model, tmp_path / "new")
    with pytest.raises(RunError, match=r"has format 2.*upgrade"):
        load_adapter_(bert(), tmp_path / "new")


def test_nothing_in_the_files_is_a_pickle(tmp_path):
    save_adapter(adapted(bert(), kind="mam"), tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "state.json",
        "tensors.safetensors",
    ]
    assert json.loads((tmp_path / "a" / "state.json").read_text())["meta"]["what"]
