"""The released rule: its reference vectors, and a transcription of its formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import small_layer
from routers import map_of, normal, router
from torch import Tensor

from sparing.experts.top_any import TopAnyRouter

# ---- the reference vectors ---------------------------------------------------------------------


VECTOR = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [-1.0, -1, -1], [1.0, 1, 0]])


def vector_router() -> TopAnyRouter:
    made = router(3, max_experts=4, start_experts=3, published=True)
    with torch.no_grad():
        rows = [[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0], [0.5, 0.5, 0]]
        made.similarity.copy_(torch.tensor(rows))
        made.threshold.copy_(torch.tensor([0.0, 0.2, 0.0, 0.6]))
    return made


def test_vector_scores_and_thresholds():
    made = vector_router()
    with torch.no_grad():
        score = torch.sigmoid(made.scale * made.cosine(VECTOR)) * made.active
        threshold = torch.sigmoid(made.scale * made.threshold)
    expected = [
        [0.73106, 0.5, 0.5, 0],
        [0.5, 0.73106, 0.5, 0],
        [0.35954, 0.35954, 0.35954, 0],
        [0.66976, 0.66976, 0.5, 0],
    ]
    torch.testing.assert_close(score, torch.tensor(expected), atol=1e-5, rtol=0)
    expected_threshold = torch.tensor([0.5, 0.54983, 0.5, 0.64566])
    torch.testing.assert_close(threshold, expected_threshold, atol=1e-5, rtol=0)


def test_vector_in_training():
    routing = vector_router()(VECTOR)
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0, 0]]
    assert map_of(routing, 4, 4).tolist() == expected
    assert routing.k.tolist() == [1, 1, 0, 2]
    assert routing.counts.tolist() == [2, 2, 0, 0]
    assert routing.unserved is not None
    assert routing.unserved.tolist() == [False, False, True, False]
    found = {name: float(value.detach()) for name, value in routing.losses.items()}
    expected_losses = {
        "diversity": 0.0,
        "simplicity": 0.01 * 1.676777,
        "balance": 0.01 * 2.666667,
        "efficiency": 0.01 * 0.25,
    }
    assert found == pytest.approx(expected_losses, abs=1e-7)


def test_vector_in_evaluation():
    routing = vector_router().eval()(VECTOR)
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0]]
    assert map_of(routing, 4, 4).tolist() == expected
    assert routing.k.tolist() == [1, 1, 1, 2]
    assert routing.losses == {}
    assert routing.unserved is not None
    assert routing.unserved.tolist() == [False, False, True, False]


def test_vector_of_unserved_tokens():
    layer = small_layer(4, 3, 3, published=True).train()
    layer.router.load_state_dict(vector_router().state_dict())
    y = layer(VECTOR)
    assert layer.record.unserved_sum.tolist() == [-1, -1, -1]
    assert not y[2].any()
    assert y[[0, 1, 3]].any(1).all()


# ---- the published rule, transcribed -----------------------------------------------------------


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def transcribed(
    x: Tensor, w: Tensor, thresholds: Tensor, mask: Tensor, training: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The formulas of the released code; x: (T, d), w: (d, E), thresholds, mask: (E,).

    Returns the weights (T, E) of the experts' outputs and the losses, not yet weighted.
    """
    slots = w.shape[1]
    unit_w = w / w.norm(dim=0)
    cosine = (x / x.norm(dim=1, keepdim=True)) @ unit_w
    score = torch.sigmoid(cosine) * mask
    gate = _Sign.apply(torch.relu(score - torch.sigmoid(thresholds)))
    k = gate.detach().sum(1)
    parts = {
        "diversity": ((unit_w.t() @ unit_w - torch.eye(slots)) * torch.outer(mask, mask))
        .square()
        .sum()
        .sqrt(),
        "simplicity": w.norm(dim=0).mean(),
        "efficiency": gate.mean(),
    }
    served = gate[k > 0]
    share = (served / k[k > 0][:, None]).mean(0)
    parts["balance"] = (share * served.mean(0)).mean() * slots**2
    if not training:
        best = torch.nn.functional.one_hot(score.argmax(1), slots)
        gate = torch.where((k == 0)[:, None], best, gate)
    return gate / k.clamp_min(1)[:, None], parts


def published_pair() -> tuple[TopAnyRouter, Tensor, Tensor]:
    """A published router in float64, its tokens, and what the gradient of each weight will be."""
    made = router(6, max_experts=5, start_experts=4, published=True).double()
    with torch.no_grad():
        made.similarity.copy_(normal(5, 6, seed=1, dtype=torch.float64))
        made.threshold.copy_(torch.tensor([0.1, 0.3, 0.25, 0.0, -1.0]))
    x = normal(40, 6, seed=2, dtype=torch.float64)
    return made, x, normal(40, 5, seed=3, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_published_routing_is_the_transcription(training):
    made, x, _ = published_pair()
    routing = made.train(training)(x)
    w, mask = made.similarity.detach().t(), made.active.double()
    expected, parts = transcribed(x, w, made.threshold.detach(), mask, training)
    torch.testing.assert_close(map_of(routing, 40, 5), expected, atol=1e-6, rtol=0)
    assert routing.k.equal((expected > 0).sum(1))
    assert set(routing.k.tolist()) >= ({0, 1, 2, 3} if training else {1, 2, 3})
    if training:
        assert set(routing.losses) == set(parts)
        for name, value in parts.items():
            torch.testing.assert_close(routing.losses[name] / 0.01, value, atol=1e-6, rtol=0)


def test_published_gradients_are_the_transcriptions():
    made, x, upstream = published_pair()
    ours = x.clone().requires_grad_()
    routing = made(ours)
    (routing.weights * upstream[routing.tokens, routing.experts]).sum().backward()
    theirs = x.clone().requires_grad_()
    w = made.similarity.detach().t().clone().requires_grad_()
    thresholds = made.threshold.detach().clone().requires_grad_()
    weights, _ = transcribed(theirs, w, thresholds, made.active.double(), True)
    (weights * upstream).sum().backward()
    assert w.grad is not None
    assert made.threshold.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(made.similarity.grad, w.grad.t(), atol=1e-6, rtol=0)
    torch.testing.assert_close(made.threshold.grad, thresholds.grad, atol=1e-6, rtol=0)
    assert made.threshold.grad[:4].all()
    assert made.threshold.grad[4] == 0


@pytest.mark.parametrize("name", ["diversity", "simplicity", "balance", "efficiency"])
def test_published_losses_have_the_transcriptions_gradients(name):
    made, x, _ = published_pair()
    made(x).losses[name].backward()
    w = made.similarity.detach().t().clone().requires_grad_()
    thresholds = made.threshold.detach().clone().requires_grad_()
    _, parts = transcribed(x, w, thresholds, made.active.double(), True)
    (0.01 * parts[name]).backward()
    assert w.grad is not None
    torch.testing.assert_close(made.similarity.grad, w.grad.t(), atol=1e-6, rtol=0)
    for ours, theirs in [(made.threshold.grad, thresholds.grad)]:
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
