"""The corrected rule against autograd with every expert on every token."""

from __future__ import annotations

import pytest
import torch
from routers import double_layer, normal, plain_expert
from torch import Tensor

from sparing.experts.layer import ExpertLayer

# ---- the corrected rule against autograd -------------------------------------------------------


def reference(layer: ExpertLayer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The corrected rule with every expert on every token; a closed one's output is its estimate.

    The gates are steps whose gradient passes straight through: to all gates of active experts, or
    to open ones alone if closed gates are told nothing.
    """
    made, options = layer.router, layer.router.options
    rows = made.similarity / made.similarity.norm(dim=1, keepdim=True)
    cosine = (x @ rows.t()) / x.norm(dim=1, keepdim=True)
    score = torch.sigmoid(made.scale * cosine)
    margin = score - torch.sigmoid(made.scale * made.threshold)
    live = made.active.expand_as(score)
    if mask is not None:
        live = live & mask[:, None]
    opened = (margin > 0) & live
    heard = opened if options.closed_gates == "none" else live
    gate = opened.double() + torch.where(heard, margin - margin.detach(), 0.0)
    best = score.detach().masked_fill(~live, -1).argmax(1)
    lonely = ~opened.any(1) if mask is None else ~opened.any(1) & mask
    forced = torch.nn.functional.one_hot(best, made.slots_count) * lonely[:, None]
    chosen = opened | (forced > 0)
    strength = {
        "score": score,
        "softmax": torch.exp(made.scale * cosine),
        "uniform": torch.ones_like(score),
    }[options.weights]
    share = (gate + forced) * strength
    total = share.sum(1, keepdim=True)
    weights = share / torch.where(total == 0, 1.0, total)
    y = torch.zeros_like(x)
    for expert in range(made.slots_count):
        estimate = torch.zeros_like(x)
        if options.closed_gates == "mean":
            estimate = layer.output_mean[expert].expand_as(x)
        computed = plain_expert(layer, x, expert)
        output = torch.where(chosen[:, expert, None], computed, estimate)
        y = y + weights[:, expert, None] * output
    return y


def gradients(layer: ExpertLayer, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    upstream = normal(*y.shape, seed=5, dtype=torch.float64)
    named = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad((y * upstream).sum(), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named.items(), found, strict=True)
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("weights", ["score", "softmax", "uniform"])
@pytest.mark.parametrize("closed", ["zero", "mean", "none"])
def test_outputs_and_gradients_are_those_of_autograd(closed, weights, padded):
    layer = double_layer(closed_gates=closed, weights=weights)
    x = normal(1, 40, 6, seed=2, dtype=torch.float64).requires_grad_()
    mask = torch.arange(40).view(1, 40) < 33 if padded else None
    layer.begin(mask)
    y = layer(x)
    assert layer.record.unserved > 0
    assert layer.record.k_counts[1:4].all()
    flat = mask if mask is None else mask[0]
    expected = reference(layer, x[0], flat)[None]
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-10)
    ours, theirs = gradients(layer, y, x), gradients(layer, expected, x)
    assert "router.threshold" in ours
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], atol=1e-12, rtol=1e-9, msg=name)
    assert ours["router.similarity"][:4].any(1).all()


@pytest.mark.parametrize(("closed", "heard"), [("zero", True), ("mean", True), ("none", False)])
@pytest.mark.parametrize("weights", ["score", "softmax", "uniform"])
def test_a_closed_gate_hears_of_the_task_loss(closed, weights, heard):
    # expert 3 is closed to every token, and expert 0 open: no token falls back
    layer = double_layer(closed_gates=closed, weights=weights)
    with torch.no_grad():
        layer.router.threshold[3] = 2.0
        layer.router.threshold[0] = -2.0
    x = normal(40, 6, seed=2, dtype=torch.float64)
    y = layer(x)
    assert layer.record.load[3] == 0
    found = gradients(layer, y, x.requires_grad_())
    assert bool(found["router.threshold"][3] != 0) == heard
    assert bool(found["router.similarity"][3].any()) == heard
    for name in layer.experts.slots():
        assert not found[f"experts.{name}"][3].any()


def test_inactive_slots_hear_nothing():
    layer = double_layer(closed_gates="mean")
    x = normal(40, 6, seed=2, dtype=torch.float64).requires_grad_()
    found = gradients(layer, layer(x), x)
    for name, grad in found.items():
        if name != "x":
            assert not grad[4].any(), name


def test_a_gate_that_should_open_opens():
    # the task wants expert 1's output, whose gate is closed to all: descent opens it
    layer = double_layer(closed_gates="mean", weights="uniform")
    with torch.no_grad():
        layer.router.threshold.fill_(-2.0)
        layer.router.threshold[1] = 1.01
        for expert in range(5):
            for weight in layer.experts.slots().values():
                weight[expert] = 0
            layer.experts.down_bias[expert] = float(expert == 1)
            layer.output_mean[expert] = float(expert == 1)
    x = normal(64, 6, seed=3, dtype=torch.float64)
    optimizer = torch.optim.SGD([layer.router.threshold], lr=5.0)
    for _ in range(60):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
    layer.record.clear()
    layer(x)
    assert layer.record.load[1] > 32
