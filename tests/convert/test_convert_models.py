"""Each supported architecture, small: parity with all experts on, the file read back, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.convert.dense import load, logits, saved
from tests.experts.zoo import ZOO, inputs

from sparing.convert import Conversion, convert, plan, to_dense

EXPORTED = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
ALL_ON = {"experts": 4, "active": 4, "scale": "unit", "gate": "zero"}


@pytest.mark.parametrize("name", sorted(ZOO))
def test_all_experts_on_are_the_dense_model_and_the_way_back_is_exact(name: str, tmp_path: Path):
    path = saved(tmp_path, name)
    out, back = tmp_path / "out", tmp_path / "back"
    made = convert(path, out, Conversion(**ALL_ON))
    assert made.planned.form == EXPORTED.get(name, "sparing")
    assert made.checked.once is True
    assert made.checked.parity <= 1e-5
    dense = load(path)
    batch = inputs(dense)
    expected = logits(dense, batch)
    found = logits(load(out), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert to_dense(out, back).exact
    again = load(back).state_dict()
    for key, value in dense.state_dict().items():
        assert torch.equal(again[key], value), key


@pytest.mark.parametrize(
    ("name", "options", "form"),
    [
        ("llama", {"residual": 1}, "qwen2_moe"),
        ("llama", {"first_dense": 1}, "qwen2_moe"),
        ("qwen3", {"last_dense": 1}, "qwen3_moe"),
        ("qwen3", {"residual": 1}, "sparing"),
        ("llama", {"experts": 5, "active": 5}, "mixtral"),  # 5 does not divide 48
        ("gpt2", {"experts": 7, "active": 7, "residual": 2}, "sparing"),
        ("phi3", {"experts": 5, "active": 5, "first_dense": 1}, "sparing"),
    ],
)
def test_other_shapes_too(name: str, options: dict[str, int], form: str, tmp_path: Path):
    path, out, back = saved(tmp_path, name), tmp_path / "out", tmp_path / "back"
    made = convert(path, out, Conversion(**{**ALL_ON, **options}))
    assert made.planned.form == form
    dense = load(path)
    batch = inputs(dense)
    expected = logits(dense, batch)
    found = logits(load(out), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    put = to_dense(out, back)
    again = load(back).state_dict()
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(again[key], value, rtol=3e-7 if not put.exact else 0, atol=0)


def test_layers_that_stay_dense_are_dense_in_the_result(tmp_path: Path):
    """A published converter leaves such layers at random weights."""
    path, out = saved(tmp_path, "qwen3"), tmp_path / "out"
    convert(path, out, Conversion(experts=4, active=1, first_dense=1))
    before, after = load(path).state_dict(), load(out).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[name], after[name])
    assert json.loads((out / "config.json").read_text())["mlp_only_layers"] == [0]


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_and_tied_checkpoints(tied: bool, tmp_path: Path):
    path = saved(tmp_path, "llama", shard="10KB", tie_word_embeddings=tied)
    assert len(list(path.glob("*.safetensors"))) > 2
    out, back = tmp_path / "out", tmp_path / "back"
    convert(path, out, Conversion(**ALL_ON))
    assert (out / "model.safetensors.index.json").is_file()
    assert len(list(out.glob("model*.safetensors"))) == len(list(path.glob("model*.safetensors")))
    dense = load(path)
    batch = inputs(dense)
    torch.testing.assert_close(logits(load(out), batch), logits(dense, batch), rtol=1e-4, atol=1e-4)
    to_dense(out, back)
    for key, value in dense.state_dict().items():
        assert torch.equal(load(back).state_dict()[key], value), key
    if tied:
        assert not any(
            "lm_head" in name for f in out.glob("model*.safetensors") for name in load_file(f)
        )


def test_bfloat16_stays_bfloat16_and_widths_take_16_bytes(tmp_path: Path):
    from tests.experts.zoo import build

    path, out = tmp_path / "dense", tmp_path / "out"
    build("llama").to(torch.bfloat16).save_pretrained(path)
    made = convert(path, out, Conversion(experts=5, active=2))
    assert made.planned.expert_width == 16  # 10 units, filled up to 8 numbers of 2 bytes
    tensors = load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert made.checked.parity <= 1e-5


def test_the_counts_of_parameters_are_those_of_the_models(tmp_path: Path):
    path, out = saved(tmp_path, "llama"), tmp_path / "out"
    made = convert(path, out, Conversion(experts=4, active=1))
    dense, sparse = load(path), load(out)
    assert made.planned.parameters["dense"] == sum(p.numel() for p in dense.parameters())
    assert made.planned.parameters["total"] == sum(p.numel() for p in sparse.parameters())
    block = 3 * 48 * 32  # of each of two layers, three quarters of which a token does not pass
    assert (
        made.planned.parameters["active"] == made.planned.parameters["total"] - 2 * block * 3 // 4
    )


def test_the_plan_says_how_the_result_loads_before_anything_is_written(tmp_path: Path):
    path = saved(tmp_path, "llama")
    before = sorted(tmp_path.rglob("*"))
    found = plan(path, Conversion(experts=4))
    assert found.loads_with == "transformers.AutoModelForCausalLM"
    other = plan(path, Conversion(experts=4, compensate="mean"))
    assert other.loads_with == "sparing.load"
    assert "biases" in other.why
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("router", ["dynmoe", "sigmoid-top-k", "top-p", "noisy-top-k", "hash"])
def test_any_router_in_the_sparing_form(router: str, tmp_path: Path):
    path, out = saved(tmp_path, "llama"), tmp_path / "out"
    convert(path, out, Conversion(experts=4, active=2, router=router))
    model = load(out)
    assert torch.isfinite(logits(model, inputs(model))).all()


def test_converting_again_gives_the_same_bytes(tmp_path: Path):
    path = saved(tmp_path, "llama")
    for out in ("a", "b"):
        convert(path, tmp_path / out, Conversion(experts=4, active=2, seed=3))
    a, b = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("a", "b"))
    assert a == b


def test_copies_sum_to_the_dense_model_and_noise_makes_them_differ(tmp_path: Path):
    path = saved(tmp_path, "llama")
    dense = load(path)
    batch = inputs(dense)
    made = convert(path, tmp_path / "same", Conversion(experts=3, active=2, method="copy"))
    assert made.checked.once is None
    torch.testing.assert_close(
        logits(load(tmp_path / "same"), batch), logits(dense, batch), rtol=1e-4, atol=1e-4
    )
    convert(path, tmp_path / "noisy", Conversion(experts=3, active=2, method="copy", noise=0.1))
    up = load(tmp_path / "noisy").model.layers[0].mlp.experts.gate_up_proj.detach()
    spread = (up[0] - up[1]).std() / dense.model.layers[0].mlp.up_proj.weight.detach().std()
    assert 0.1 < float(spread) < 0.2  # the difference of two draws of 0.1
