"""The short way of decoding one token against the general way: the same experts and outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparing
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer
from sparing.experts.one_token import best, softmax

DIM, SLOTS = 16, 6
METHODS: dict[str, Any] = {
    "top-k": lambda: sparing.TopK(experts=SLOTS, k=2),
    "top-k of 1": lambda: sparing.TopK(experts=SLOTS, k=1),
    "top-k, as they are": lambda: sparing.TopK(experts=SLOTS, k=3, normalize=False),
    "top-any": lambda: sparing.TopAny(max_experts=SLOTS, target_k=2),
    "top-any by score": lambda: sparing.TopAny(max_experts=SLOTS, weights="score"),
    "top-any, uniform": lambda: sparing.TopAny(max_experts=SLOTS, weights="uniform"),
}
KINDS: dict[str, dict[str, Any]] = {
    "gated": {"gated": True},
    "gated, biased": {"gated": True, "bias": True, "activation": "relu"},
    "plain": {"gated": False, "bias": True, "activation": "gelu"},
    "plain, tanh": {"gated": False, "activation": "gelu_tanh"},
}


def build(name: str, kind: str = "gated", seed: int = 0) -> ExpertLayer:
    experts = Experts(DIM, 24, SLOTS, **KINDS[kind])
    experts.init_(generator=torch.Generator().manual_seed(seed))
    layer = ExpertLayer(METHODS[name]().router(DIM, seed), experts)
    for batch in range(4):  # thresholds are calibrated
        layer.router(torch.randn(64, DIM, generator=torch.Generator().manual_seed(batch)))
    return layer.eval()


def token(seed: int) -> Tensor:
    return torch.randn(1, 1, DIM, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def general(layer: ExpertLayer, x: Tensor) -> Tensor:
    """The output of the router and the dense reference."""
    routing = layer.router(x.reshape(1, -1))
    return layer.experts(x.reshape(1, -1), routing, backend="dense").view(x.shape)


@pytest.mark.parametrize("name", sorted(METHODS))
@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**16),
    switched_off=st.sets(st.integers(0, SLOTS - 1), max_size=SLOTS - 1),
)
def test_the_same_as_the_general_way(
    name: str, kind: str, seed: int, switched_off: set[int]
) -> None:
    layer = build(name, kind, seed)
    layer.router.active[list(switched_off)] = False
    x = token(seed)
    with torch.no_grad():
        found = layer.router.one(x.view(-1))
        routing = layer.router(x.view(1, -1))
        if found is not None:
            pairs = sorted(zip(*found, strict=True))
            assert [expert for expert, _weight in pairs] == routing.experts.tolist()
            torch.testing.assert_close(
                torch.tensor([weight for _expert, weight in pairs]), routing.weights
            )
        torch.testing.assert_close(layer(x), general(layer, x))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_random_tokens_go_the_short_way(name: str) -> None:
    layer = build(name)
    with torch.no_grad():
        short = sum(layer.router.one(token(seed).view(-1)) is not None for seed in range(50))
    assert short >= 48


@pytest.mark.parametrize("name", sorted(METHODS))
def test_ties_and_what_is_not_finite_go_the_general_way(name: str) -> None:
    layer = build(name)
    with torch.no_grad():
        if name.startswith("top-k"):
            layer.router.similarity[:] = layer.router.similarity[0].clone()
        else:
            x = token(0).view(1, -1)
            layer.router.threshold.copy_(layer.router.cosine(x)[0])  # type: ignore[attr-defined, operator]
        assert layer.router.one(token(0).view(-1)) is None
        torch.testing.assert_close(layer(token(0)), general(layer, token(0)))
        for broken in (torch.nan, torch.inf):
            x = token(1)
            x[0, 0, 3] = broken
            assert layer.router.one(x.view(-1)) is None
            assert layer(x).isnan().any()
        assert layer(torch.zeros(1, 1, DIM)).abs().max() == 0  # no direction, equal scores


def test_tokens_that_open_no_gate_take_the_best_expert() -> None:
    layer = build("top-any")
    with torch.no_grad():
        layer.router.threshold.fill_(0.99)  # type: ignore[operator]
        found = layer.router.one(token(2).view(-1))
        assert found is not None
        assert found[0] == layer.router(token(2).view(1, -1)).experts.tolist()
        assert found[1] == [1.0]


@pytest.mark.parametrize("name", ["top-k", "top-any"])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, kind: str, dtype: torch.dtype) -> None:
    layer = build(name, kind)
    layer.experts.to(dtype)
    x = token(3).to(dtype)
    with torch.no_grad():
        assert layer.router.one(x.view(-1)) is not None
        found = layer(x)
        assert found.dtype == dtype
        layer.experts.float()
        scale = float(found.abs().max())
        torch.testing.assert_close(
            found.float() / scale, layer(x.float()) / scale, atol=0.03, rtol=0.0
        )


def test_what_must_go_the_general_way() -> None:
    layer = build("top-k")
    calls = []
    handle = layer.router.register_forward_hook(lambda *_: calls.append("router"))
    with torch.no_grad():
        layer(token(0))  # who watches the router must see its calls
        handle.remove()
        handle = layer.experts.register_forward_pre_hook(lambda *_: calls.append("experts"))
        layer(token(0))
        handle.remove()
        layer.begin(torch.zeros(1, 1, dtype=torch.bool))
        assert not layer(token(0)).any()  # padding has no experts
        layer.begin(torch.ones(1, 1, dtype=torch.bool))
        torch.testing.assert_close(layer(token(0)), general(layer, token(0)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(token(0)).dtype == torch.bfloat16
    assert calls == ["router", "experts"]
    layer.begin()
    x = token(0).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    before = int(layer.record.costs[2])
    layer.train()
    with torch.no_grad():
        layer(token(0))
    assert int(layer.record.costs[2]) == before + 1


def test_best_leaves_to_the_general_way_what_rounding_decides() -> None:
    live = [True] * 4
    assert best([0.1, 0.4, 0.2, 0.3], live, 2) == [1, 3]
    assert best([0.1, 0.4, 0.2, 0.3], [True, False, True, True], 2) == [3, 2]
    assert best([0.1, 0.4, 0.3, 0.3], live, 2) is None
    assert best([0.1, 0.4, 0.3, 0.3], live, 3) == [1, 3, 2]
    assert best([1e4, 2e4, 3e4, 3e4 + 1], live, 1) is None
    assert best([0.0, 100.0, 1.0, 50.0], live, 1) == [1]
    assert best([0.0, 100.0, 1.0, 5.0], live, 2) is None
    assert best([0.0, float("nan"), 1.0, 5.0], live, 1) is None
    assert best([0.0, float("-inf"), 1.0, 5.0], live, 1) is None
    assert best([0.0], [False], 1) is None
    assert best([0.5, 0.1], [True, True], 4) == [0, 1]


def test_softmax_of_a_few() -> None:
    logits = [3.0, 1000.0, 1001.0]
    expected = torch.tensor(logits, dtype=torch.float64)[1:].softmax(0)
    torch.testing.assert_close(torch.tensor(softmax(logits, [1, 2])), expected.float())
