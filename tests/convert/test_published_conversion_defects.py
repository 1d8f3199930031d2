"""What is broken in released converters (LLaMA-MoE v1 and v2), and is not here.

Defects of routers have their tests in tests/experts; the layers that stay dense (v2's attention
converter leaves them random) and the gate of zeros in the files beside this one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.convert.dense import load, saved
from tests.experts.zoo import inputs
from torch import Tensor

import sparing
from sparing.convert import Conversion, convert


def released_balance(logits: Tensor, k: int) -> Tensor:
    """The formula of LLaMA-MoE v2: the softmax is taken over a token's k chosen logits alone."""
    top = logits.topk(k, dim=1)
    share = top.values.softmax(1).mean()  # over tokens and choices: always 1/k
    chosen = torch.zeros_like(logits).scatter(1, top.indices, 1.0)
    return logits.shape[1] * (chosen.mean(0) / k * share).sum()


@pytest.mark.parametrize("collapsed", [False, True])
def test_10_the_balance_loss_of_a_converted_model_is_no_constant(collapsed: bool, tmp_path: Path):
    """The released one is E/k: 4.0 for 8 experts of which 2 are chosen, whatever the logits."""
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    if collapsed:
        logits[:, 0] += 100
    logits.requires_grad_(True)
    constant = released_balance(logits, 2)
    (gradient,) = torch.autograd.grad(constant, logits)
    assert float(constant.detach()) == pytest.approx(4.0)
    assert float(gradient.abs().max()) < 1e-6

    path, out = saved(tmp_path, "llama"), tmp_path / "out"
    convert(path, out, Conversion(experts=8, active=2, form="sparing"))
    model = load(out).train()
    if collapsed:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.router.similarity[1:] *= 0.1
    model(**inputs(model))
    sparing.router_loss(model).backward()
    for layer in model.model.layers:
        assert float(layer.mlp.router.similarity.grad.abs().max()) > 1e-6


def test_5_the_weighted_residual_path_runs_and_trains(tmp_path: Path):
    """Released: a tensor is multiplied by an output object, and lacks a dimension."""
    path = saved(tmp_path, "llama")
    for form in ("export", "sparing"):
        out = tmp_path / form
        wanted = Conversion(experts=4, active=2, residual=1, form=form)  # type: ignore[arg-type]
        convert(path, out, wanted)
        model = load(out).train()
        batch = inputs(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        for name, parameter in model.named_parameters():
            if "shared" in name:
                assert parameter.grad is not None, name


def test_7_and_12_experts_without_tokens_and_batches_without_tokens(tmp_path: Path):
    """Released: experts without tokens have no gradient, and no token at all is an error."""
    path, out = saved(tmp_path, "llama"), tmp_path / "out"
    convert(path, out, Conversion(experts=4, active=1, gate="zero", form="sparing"))
    model = load(out).train()
    model(**inputs(model)).logits.sum().backward()
    layer = model.model.layers[0].mlp
    assert layer.experts.up.grad.shape == layer.experts.up.shape
    empty = layer(torch.zeros(1, 0, 32))
    assert empty.shape == (1, 0, 32)


def test_loading_finds_the_trained_gate(tmp_path: Path):
    """Released: "weight_gate not initialised from checkpoint"."""
    path, out = saved(tmp_path, "llama"), tmp_path / "out"
    convert(path, out, Conversion(experts=4, active=2, seed=5))
    from safetensors.torch import load_file

    stored = load_file(out / "model.safetensors")
    model = load(out)
    for number, layer in enumerate(model.model.layers):
        name = f"model.layers.{number}.block_sparse_moe.gate.weight"
        assert torch.equal(layer.mlp.gate.weight, stored[name])
        assert float(stored[name].std()) > 0.1


def test_a_loaded_conversion_is_saved_and_loaded_again(tmp_path: Path):
    """With biases that the dense model lacks, and a block described by hand."""
    import json

    from tests.convert.dense import logits

    path, out, again = saved(tmp_path, "llama"), tmp_path / "out", tmp_path / "again"
    wanted = Conversion(experts=4, active=2, residual=1, compensate="mean", sequences=4, length=8)
    convert(path, out, wanted)
    model = load(out)
    assert float(model.model.layers[0].mlp.experts.down_bias.detach().abs().max()) > 0
    sparing.save(model, again)
    assert json.loads((again / "sparing.json").read_text())["format"] == 3
    batch = inputs(model)
    assert torch.equal(logits(load(again), batch), logits(model, batch))
