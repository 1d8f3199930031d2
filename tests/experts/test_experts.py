"""The layer of stacked experts: requests, precision, memory, freezing, counting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sparing.core.errors import RequestError
from sparing.experts.experts import Experts
from sparing.experts.routing import Routing


def layer(*sizes: int, seed: int = 0, bias: bool = False, gated: bool = True) -> Experts:
    experts = Experts(*sizes, gated=gated, bias=bias)
    experts.init_(generator=torch.Generator().manual_seed(seed))
    return experts


def routed(
    tokens: int, slots: int, *, density: float = 0.4, seed: int = 0, grad: bool = False
) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, slots, generator=generator) < density
    weights = torch.rand(tokens, slots, generator=generator)
    return Routing(chosen, weights.requires_grad_(grad))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_one_expert_with_weight_one_is_a_plain_feed_forward() -> None:
    experts = layer(8, 16, 1, bias=True)
    x = normal(5, 8)
    routing = Routing(torch.ones(5, 1).bool(), torch.ones(5, 1))
    assert experts.gate is not None
    assert experts.up_bias is not None
    assert experts.down_bias is not None
    hidden = F.silu(x @ experts.gate[0].T) * F.linear(x, experts.up[0], experts.up_bias[0])
    expected = F.linear(hidden, experts.down[0], experts.down_bias[0])
    torch.testing.assert_close(experts(x, routing), expected)
    torch.testing.assert_close(experts.reference(x, routing), expected)


def test_a_token_without_rows_gets_zeros() -> None:
    experts = layer(8, 16, 3, bias=True)
    chosen = torch.tensor([[True, False, True], [False, False, False]])
    y = experts(normal(2, 8), Routing(chosen, torch.ones(2, 3)))
    assert y[0].all()
    assert not y[1].any()


def test_sums_are_the_unweighted_outputs_of_each_expert() -> None:
    experts = layer(8, 16, 3)
    x, routing = normal(6, 8), routed(6, 3, density=0.6, grad=True)
    _y, sums = experts(x, routing, want_means=True)
    assert not sums.requires_grad
    ones = torch.ones(6, 1)
    for expert in range(3):
        mine = torch.zeros(6, 3, dtype=torch.bool)
        mine[routing.tokens[routing.experts == expert], expert] = True
        alone = experts(x, Routing(mine, ones.expand(6, 3)))
        torch.testing.assert_close(sums[expert], alone.sum(0))


@pytest.mark.parametrize("backend", ["loop", "grouped", "padded", "gathered", "dense"])
def test_autocast_computes_in_half_and_returns_gradients_in_single(backend: str) -> None:
    experts = layer(16, 32, 4)
    x, routing = normal(30, 16).requires_grad_(), routed(30, 4, grad=True)
    expected = experts(x, routing, backend="loop")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x, routing, backend=backend)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.02)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_frozen_experts_get_no_gradient_and_tokens_still_do() -> None:
    experts = layer(8, 16, 3)
    x, routing = normal(9, 8).requires_grad_(), routed(9, 3, grad=True)
    (expected,) = torch.autograd.grad(experts(x, routing, backend="dense").sum(), x)
    experts.requires_grad_(False)
    experts(x, routing, backend="loop").sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert all(parameter.grad is None for parameter in experts.parameters())


def test_only_the_weights_of_the_routing_learn() -> None:
    experts = layer(8, 16, 3).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(9, 3, generator=generator).requires_grad_()
    x, chosen = normal(9, 8), torch.rand(9, 3, generator=generator) < 0.5
    grads = [
        torch.autograd.grad(experts(x, Routing(chosen, weights), backend=backend).sum(), weights)[0]
        for backend in ("dense", "loop", "grouped")
    ]
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])
    assert not grads[1][~chosen].any()


def test_second_derivatives_are_refused_with_a_reason() -> None:
    experts = layer(8, 16, 2)
    x = normal(4, 8).requires_grad_()
    y = experts(x, routed(4, 2, density=1.0))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_gradient_saves_nothing_and_changes_nothing() -> None:
    experts = layer(8, 16, 3)
    x, routing = normal(200, 8), routed(200, 3)
    with torch.no_grad():
        quiet = experts(x, routing, backend="loop")
    assert not quiet.requires_grad
    assert torch.equal(quiet, experts(x, routing, backend="loop"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda e, x, r: e(x[:, :3], r), r"tokens must be \(T, 8\), got \(4, 3\)"),
        (lambda e, x, r: e(x[:2], r), "the routing is for 4 tokens, got 2"),
        (lambda e, x, r: e(x, routed(4, 5)), "for 5 experts, the layer has 3"),
        (lambda e, x, r: e(x, r, backend="grouper"), 'did you mean "grouped"'),
        (lambda e, x, r: e(x.double(), r), "tokens are torch.float64"),
        (lambda e, x, r: e.double()(x.double(), r, backend="grouped"), 'backend="loop"'),
        (lambda e, x, r: Experts(8, 16, 3, activation="swish"), "unknown activation"),
        (lambda e, x, r: Experts(8, 0, 3), "at least 1"),
    ],
)
def test_wrong_requests_say_what_was_expected(request_, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RequestError, match=message):
        request_(layer(8, 16, 3), normal(4, 8), routed(4, 3, density=1.0))


def test_one_slot_is_drawn_anew_and_the_others_stay() -> None:
    experts = Experts(8, 16, 3, bias=True, init_std=0.1)
    before = {name: value.detach().clone() for name, value in experts.slots().items()}
    experts.init_(1, generator=torch.Generator().manual_seed(9))
    for name, value in experts.slots().items():
        assert torch.equal(value[[0, 2]], before[name][[0, 2]])
        if name.endswith("bias"):
            assert not value.any()
        else:
            assert not torch.equal(value[1], before[name][1])
            assert abs(float(value.detach().std()) - 0.1) < 0.02


@pytest.mark.parametrize("gated", [True, False])
def test_flops_are_those_of_the_counter(gated: bool) -> None:
    experts = layer(8, 16, 3, gated=gated)
    x, routing = normal(20, 8).requires_grad_(), routed(20, 3)
    with FlopCounterMode(display=False) as forward:
        y = experts(x, routing, backend="loop")
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    counted = experts.flops(routing.rows)
    assert counted > 0
    assert forward.get_total_flops() == counted
    assert backward.get_total_flops() == 2 * counted


def peak_bytes(run) -> int:  # type: ignore[no-untyped-def]
    """The most memory allocated above the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _when, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_peak_memory_of_forward_and_backward(density: float) -> None:
    tokens, dim, width, slots = 512, 64, 128, 8
    experts = layer(dim, width, slots)
    x, grad = normal(tokens, dim).requires_grad_(), normal(tokens, dim)
    routing = routed(tokens, slots, density=density, grad=True)
    peak = peak_bytes(lambda: experts(x, routing, backend="loop").backward(grad))
    inputs = 2 * tokens * dim
    # of each row: the token, two inputs of the product, the product, the output
    activations = routing.rows * (2 * dim + 3 * width)
    weights = sum(parameter.numel() for parameter in experts.parameters())
    allowed = 1.2 * 4 * (inputs + activations + 2 * weights)
    assert 4 * weights < peak
    assert peak + 4 * (inputs + weights) <= allowed
