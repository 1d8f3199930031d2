"""What expert layers account for is what was really multiplied, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparing
from sparing.core.flops import count, matmul_flops
from sparing.core.ledger import Ledger
from sparing.experts.layer import ExpertLayer, expert_layers

IDS = torch.arange(120).reshape(4, 30) % 61


def counting() -> FlopCounterMode:
    """Torch's counter, with the products that it misses: in place, and grouped by expert."""

    def grouped(a: list[int], b: list[int], *_: Any, **__: Any) -> int:
        return matmul_flops(a[-2], a[-1], b[-1])

    def in_place(y: list[int], a: list[int], b: list[int], **_: Any) -> int:
        return matmul_flops(a[0], a[1], b[1])

    known = {torch.ops.aten.addmm_: in_place, torch.ops.aten._grouped_mm: grouped}
    return FlopCounterMode(display=False, custom_mapping=known)


def layer_of(method: Any, *, gated: bool = True) -> ExpertLayer:
    from sparing.experts.always import AlwaysOn
    from sparing.experts.experts import Experts

    torch.manual_seed(0)
    experts = Experts(
        32, 48, method.slots, gated=gated, bias=not gated, activation="silu" if gated else "gelu"
    )
    always = None
    if method.options.shared or method.options.residual:
        kinds = {"gated": gated, "bias": not gated, "activation": experts.activation}
        always = AlwaysOn(
            32,
            shared=Experts(32, 48, 1, **kinds) if method.options.shared else None,
            residual=Experts(32, 64, 1, **kinds) if method.options.residual else None,
            learned=method.options.residual_coefficient,
        )
    return ExpertLayer(method.router(32), experts, always=always).train()


NULL = {"k": 3, "null_experts": 3}

METHODS = [
    pytest.param(lambda: sparing.TopK(experts=6, k=1), id="top-1"),
    pytest.param(lambda: sparing.TopK(experts=6, k=3), id="top-3"),
    pytest.param(lambda: sparing.NoisyTopK(experts=6, k=2), id="noisy"),
    pytest.param(lambda: sparing.RandomExperts(experts=6, k=1.5), id="random"),
    pytest.param(lambda: sparing.HashExperts(experts=6, k=2), id="hash"),
    pytest.param(lambda: sparing.ExpertChoice(experts=6, k=1.5), id="expert choice"),
    pytest.param(lambda: sparing.TopAny(max_experts=6), id="top-any"),
    pytest.param(lambda: sparing.TopAny(max_experts=6, start_experts=4), id="four of six"),
    pytest.param(lambda: sparing.TopAny(max_experts=6, published=True), id="published"),
    pytest.param(lambda: sparing.TopP(experts=6), id="top-p"),
    pytest.param(lambda: sparing.ReLURouter(experts=6), id="relu"),
    pytest.param(lambda: sparing.TopK(experts=6, **NULL), id="null"),
    pytest.param(lambda: sparing.TopK(experts=6, null_kind="copy", **NULL), id="copies"),
    pytest.param(lambda: sparing.TopK(experts=6, null_kind="constant", **NULL), id="constants"),
    pytest.param(lambda: sparing.TopP(experts=6, shared=2, shared_width=24), id="shared"),
    pytest.param(
        lambda: sparing.TopK(experts=6, residual=True, residual_coefficient=True), id="residual"
    ),
]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("make", METHODS)
def test_routed_rows_and_router_agree_with_torchs_counter(make: Any, gated: bool) -> None:
    layer = layer_of(make(), gated=gated)
    spent = measured = 0
    for seed in range(3):
        x = torch.randn(200, 32, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        with counting() as counter:
            y = layer(x)
            (y.square().sum() + sparing.router_loss(nn.ModuleList([layer]))).backward()
        measured += counter.get_total_flops()
        spent += layer.take_flops()[0]
    assert measured > 0
    assert spent == pytest.approx(measured, rel=0.01)


def test_only_rows_that_were_routed_are_spent() -> None:
    layer = layer_of(sparing.TopK(experts=6, k=2))
    x = torch.randn(50, 32, requires_grad=True)
    with counting() as forward:
        y = layer(x)
    with counting() as backward:
        y.sum().backward()
    layer.take_losses()
    products = layer.experts.flops(100)
    router = 2 * 50 * 32 * 6
    assert forward.get_total_flops() == products + router
    assert backward.get_total_flops() == 2 * (products + router)
    spent, dense = layer.take_flops()
    assert (spent, dense) == (3 * (products + router), 3 * layer.experts.flops(300))
    assert layer.take_flops() == (0, 0), "taken once"


def test_evaluation_and_recomputation_spend_nothing() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = layer_of(sparing.TopK(experts=6, k=2)), torch.randn(50, 32, requires_grad=True)
    layer(x).sum().backward()
    once = layer.take_flops()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.take_flops() == once
    layer.eval()
    layer(x)
    assert layer.take_flops() == (0, 0)


@pytest.mark.parametrize("make", METHODS)
def test_a_whole_model_agrees_with_torchs_counter(make: Any) -> None:
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    method = make()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    sparing.moefy_(model, method)
    model.train()

    def loss() -> torch.Tensor:
        value: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
        return value

    static = count(model, loss)
    assert not any("experts" in name or "router" in name for name in static.by_module)
    assert [layer.take_flops() for layer in expert_layers(model)] == [(0, 0)] * 2, "left no trace"
    with sdpa_kernel(SDPBackend.MATH), counting() as counter:
        (loss() + sparing.router_loss(model)).backward()
    ledger = Ledger()
    ledger.add("flops", spent=static.total)
    method.bind(model=model)
    method.account(ledger)
    measured = counter.get_total_flops()
    assert measured > static.total
    assert ledger.spent("flops") == pytest.approx(measured, rel=0.01)
    # every expert on every token would have cost more, by what was left out
    assert ledger.dense("flops") > ledger.spent("flops")
