"""Top-any routing: the reference vectors, both rules against plain references, and the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from planted import small_layer
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts.layer import ExpertLayer
from sparing.experts.losses import LossWeights
from sparing.experts.routing import Routing
from sparing.experts.top_any import PUBLISHED_LOSSES, TopAny, TopAnyOptions, TopAnyRouter


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def router(dim: int = 8, seed: int = 0, **options: Any) -> TopAnyRouter:
    """A router in training whose thresholds start at 0, unless told otherwise."""
    chosen = TopAnyOptions(**({"calibration": 0} | options))
    return TopAnyRouter(dim, chosen, seed).train()


def map_of(routing: Routing, tokens: int, slots: int) -> Tensor:
    """(T, E), the weights where there are rows and 0 elsewhere."""
    found = torch.zeros(tokens, slots, dtype=routing.weights.dtype)
    found[routing.tokens, routing.experts] = routing.weights.detach()
    return found


def same_rows(left: Routing, right: Routing) -> bool:
    return left.tokens.equal(right.tokens) and left.experts.equal(right.experts)


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


# ---- the corrected rule against autograd -------------------------------------------------------


def plain_expert(layer: ExpertLayer, x: Tensor, expert: int) -> Tensor:
    net = {name: weight[expert] for name, weight in layer.experts.slots().items()}
    hidden = torch.relu(x @ net["up"].t() + net["up_bias"])
    return hidden @ net["down"].t() + net["down_bias"]


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


def double_layer(**options: Any) -> ExpertLayer:
    layer = small_layer(5, 4, 6, calibration=0, losses=LossWeights(), **options).double().train()
    with torch.no_grad():
        layer.router.similarity.copy_(normal(5, 6, seed=1, dtype=torch.float64))
        layer.router.threshold.copy_(torch.tensor([0.1, 0.3, 0.25, 0.2, -1.0]))
        if layer.router.tracks_outputs:
            layer.output_mean.copy_(normal(5, 6, seed=4, dtype=torch.float64))
    return layer


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


# ---- fallback and weights ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_token_that_no_gate_opens_for_takes_its_best_active_expert(training):
    made = router(max_experts=4, start_experts=3).train(training)
    with torch.no_grad():
        made.threshold.fill_(1.0)
    x = torch.cat([normal(30, 8), made.similarity[3:].detach()])
    routing = made(x)
    cosine = made.cosine(x).detach()
    assert routing.k.tolist() == [1] * 31
    assert routing.weights.tolist() == [1.0] * 31
    best = cosine[:, :3].argmax(1)
    assert map_of(routing, 31, 4).argmax(1).equal(best)
    assert routing.unserved is not None
    assert routing.unserved.all()
    assert routing.counts[3] == 0


def test_the_published_rule_falls_back_in_evaluation_only():
    made = router(max_experts=4, published=True)
    with torch.no_grad():
        made.threshold.fill_(1.0)
    x = normal(20, 8)
    assert made(x).rows == 0
    assert made.eval()(x).k.tolist() == [1] * 20
    assert made(x).weights.tolist() == [1.0] * 20


@pytest.mark.parametrize("weights", ["score", "softmax", "uniform"])
def test_weights_of_a_token_sum_to_one(weights):
    made = router(max_experts=6, weights=weights)
    x = normal(50, 8)
    routing = made(x)
    found = map_of(routing, 50, 6)
    torch.testing.assert_close(found.sum(1), torch.ones(50))
    if weights == "uniform":
        k = routing.k[routing.tokens].float()
        torch.testing.assert_close(routing.weights, 1 / k)
        return
    logits = made.scale * made.cosine(x).detach()
    strength = torch.sigmoid(logits) if weights == "score" else logits.exp()
    kept = strength * (found > 0)
    torch.testing.assert_close(found, kept / kept.sum(1, keepdim=True))


@pytest.mark.parametrize("weights", ["score", "softmax", "uniform"])
def test_large_scales_keep_gates_weights_and_choice_apart(weights):
    # sigmoid(22) and sigmoid(30) are both 1 in float32
    made = router(4, max_experts=3, scale=40.0, weights=weights).eval()
    with torch.no_grad():
        made.similarity.copy_(torch.eye(4)[:3])
        made.threshold.fill_(0.55)
    x = torch.tensor([[0.8, 0.59, 0.1, 0.0], [0.5, 0.52, 0.51, 0.47]])
    routing = made(x)
    assert routing.k.tolist() == [2, 1]
    assert map_of(routing, 2, 3)[1].argmax() == 1
    if weights == "softmax":
        cosine = made.cosine(x)[0, :2].detach()
        expected = torch.softmax(40 * cosine, 0)
        torch.testing.assert_close(map_of(routing, 2, 3)[0, :2], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [0.5, 64.0, 400.0])
@pytest.mark.parametrize("weights", ["score", "softmax", "uniform"])
def test_any_scale_gives_finite_weights_and_gradients(weights, scale):
    made = router(max_experts=4, start_experts=3, scale=scale, weights=weights)
    with torch.no_grad():
        made.threshold.copy_(torch.tensor([0.9, 0.0, -0.9, 0.0]))
    x = torch.cat([normal(60, 8), 3 * made.similarity.detach()]).requires_grad_()
    mask = torch.arange(64) != 5
    routing = made(x, mask)
    assert torch.isfinite(routing.weights).all()
    (routing.weights * torch.arange(routing.rows)).sum().backward()
    assert x.grad is not None
    assert made.similarity.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(made.similarity.grad).all()


# ---- padding, and inputs at the edge -----------------------------------------------------------


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_padding_gets_no_rows_and_changes_no_other(published, training):
    made = router(max_experts=4, published=published).train(training)
    x = normal(40, 8)
    mask = normal(40, seed=1) > 0
    padded, alone = made(x, mask), made(x[mask])
    assert not padded.k[~mask].any()
    assert padded.k[mask].equal(alone.k)
    assert padded.counts.equal(alone.counts)
    torch.testing.assert_close(map_of(padded, 40, 4)[mask], map_of(alone, len(alone.k), 4))
    assert padded.unserved is not None
    assert alone.unserved is not None
    assert padded.unserved[mask].equal(alone.unserved)
    assert not padded.unserved[~mask].any()
    assert padded.losses.keys() == alone.losses.keys()
    for name, value in padded.losses.items():
        torch.testing.assert_close(value, alone.losses[name])


EDGES = [{}, {"published": True}, {"weights": "score", "closed_gates": "mean"}]
EVERY_LOSS = LossWeights(diversity=1, simplicity=1, balance=1, z=1, efficiency=1)


@pytest.mark.parametrize("options", EDGES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["no tokens", "all padded"])
def test_no_real_token_gives_no_rows(options, training, case):
    layer = small_layer(4, 3, losses=EVERY_LOSS, **options).train(training)
    tokens = 0 if case == "no tokens" else 6
    x = normal(1, tokens, 8).requires_grad_()
    layer.begin(torch.zeros(1, tokens, dtype=torch.bool))
    y = layer(x)
    assert y.shape == x.shape
    assert not y.any()
    found = list(layer.take_losses().values())
    assert all(torch.isfinite(value) for value in found)
    assert bool(found) == training
    (y.sum() + sum(found, torch.zeros(()))).backward()
    for parameter in layer.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    assert int(layer.record.tokens) == 0
    assert not layer.router.threshold.any()
    assert layer.router.calibrated == 0


@pytest.mark.parametrize("options", EDGES)
def test_one_expert_takes_everything_it_must(options):
    layer = small_layer(1, 1, **options).train()
    x = normal(20, 8).requires_grad_()
    y = layer(x)
    layer(x).sum().backward()
    if options.get("published"):
        assert layer.record.k_counts[0] > 0
    else:
        assert layer.record.k_counts.tolist() == [0, 40]
        torch.testing.assert_close(y, plain_expert(layer, x, 0))


def test_tokens_of_zeros_have_finite_gradients():
    for options in EDGES:
        made = router(max_experts=4, losses=LossWeights(z=1.0), **options)
        x = torch.cat([torch.zeros(2, 8), normal(6, 8)]).requires_grad_()
        routing = made(x)
        total = (routing.weights * torch.arange(1.0, routing.rows + 1)).sum()
        (total + routing.losses["z"]).backward()
        assert x.grad is not None
        assert float(x.grad.abs().max()) < 100


def test_length_and_magnitude_of_tokens_do_not_matter():
    made = router(max_experts=4, weights="score")
    x = normal(40, 8)
    plain = made(x)
    for factor in (1e-6, 1e6):
        scaled = made(factor * x)
        assert same_rows(plain, scaled)
        torch.testing.assert_close(plain.weights, scaled.weights)


# ---- calibration -------------------------------------------------------------------------------


@pytest.mark.parametrize("start_k", [0.5, 1.0, 2.0, 3.5, 6.0])
def test_calibration_opens_as_many_gates_as_asked(start_k):
    made = router(16, max_experts=6, start_k=start_k, calibration=1)
    x = normal(500, 16) + 1  # a common direction: the cosines are far from centred
    routing = made(x)
    opened = (made.cosine(x) > made.threshold).sum(1)
    if start_k < 6:
        assert float(opened.float().mean()) == pytest.approx(start_k, abs=6 / 500)
        # and each expert the same, so that none is overloaded
        load = (made.cosine(x) > made.threshold).sum(0)
        assert load.tolist() == pytest.approx([500 * start_k / 6] * 6, abs=1)
    else:
        assert float(opened.float().mean()) > 5.98
    assert routing.k.equal(opened.clamp_min(1))
    assert made.calibrated == 1


def test_target_k_takes_the_place_of_start_k():
    made = router(16, max_experts=6, start_k=4.0, target_k=1.5, calibration=1)
    x = normal(500, 16)
    made(x)
    opened = (made.cosine(x) > made.threshold).sum(1)
    assert float(opened.float().mean()) == pytest.approx(1.5, abs=6 / 500)


def test_calibration_is_the_running_mean_of_its_batches_and_then_stops():
    made = router(16, max_experts=6, calibration=2)
    batches = [normal(300, 16, seed=seed) + seed for seed in range(3)]
    quantiles = [torch.quantile(made.cosine(x).detach(), 1 - 2 / 6, dim=0) for x in batches]
    made(batches[0])
    torch.testing.assert_close(made.threshold.detach(), quantiles[0])
    made(batches[1])
    both = (quantiles[0] + quantiles[1]) / 2
    torch.testing.assert_close(made.threshold.detach(), both)
    made(batches[2])
    torch.testing.assert_close(made.threshold.detach(), both)
    assert made.calibrated == 2


def test_calibration_is_of_real_tokens_in_training():
    made = router(16, max_experts=6, calibration=1)
    made.eval()(normal(100, 16))
    assert made.calibrated == 0
    assert not made.threshold.any()
    x, mask = normal(200, 16), torch.arange(200) < 120
    made.train()(torch.where(mask[:, None], x, x + 9), mask)
    alone = router(16, max_experts=6, calibration=1)
    alone(x[mask])
    assert made.threshold.equal(alone.threshold)


def test_calibration_waits_for_a_batch_with_tokens():
    made = router(16, max_experts=6, calibration=1)
    made(normal(4, 16), torch.zeros(4, dtype=torch.bool))
    made(normal(0, 16))
    assert made.calibrated == 0
    made(normal(100, 16))
    assert made.calibrated == 1


def test_calibration_leaves_inactive_slots_alone():
    made = router(16, max_experts=6, start_experts=4, calibration=1)
    made(normal(100, 16))
    assert made.threshold[:4].all()
    assert not made.threshold[4:].any()


@pytest.mark.parametrize(("share", "expected"), [("active", 2.0), ("slots", 2.0 * 3 / 6)])
def test_missing_experts_leave_their_share_or_not(share, expected):
    adapt = {"share": share}
    made = router(16, max_experts=6, start_experts=3, calibration=1, adapt=adapt)
    x = normal(600, 16)
    made(x)
    opened = (made.cosine(x) > made.threshold)[:, :3].sum(1)
    assert float(opened.float().mean()) == pytest.approx(expected, abs=6 / 600)


# ---- holding a target --------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.0, 2.5])
def test_threshold_updates_drive_the_mean_to_the_target(target):
    made = router(16, max_experts=6, target_k=target)
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(16, generator=generator)
    seen = []
    for _ in range(200):
        x = torch.randn(400, 16, generator=generator) + shift
        routing = made(x)
        opened = routing.counts - torch.bincount(
            routing.experts[routing.unserved[routing.tokens]], minlength=6
        )
        seen.append(int(opened.sum()) / 400)
        made.update_thresholds(opened, torch.tensor(400))
    assert abs(seen[0] - target) > 0.3
    assert sum(seen[-20:]) / 20 == pytest.approx(target, rel=0.05)
    load = opened / 400
    assert load.tolist() == pytest.approx([target / 6] * 6, abs=0.1)


def test_threshold_updates_are_bounded_and_leave_inactive_slots_alone():
    made = router(16, max_experts=4, start_experts=3, target_k=1.5, rate=0.2)
    made.update_thresholds(torch.tensor([900, 50, 0, 700]), torch.tensor(100))
    step = 0.2 / math.sqrt(16)
    assert made.threshold.tolist() == pytest.approx([step, 0.0, -step, 0.0])
    for _ in range(100):
        made.update_thresholds(torch.tensor([900, 50, 0, 700]), torch.tensor(100))
    assert made.threshold.tolist() == pytest.approx([1.0, 0.0, -1.0, 0.0])
    assert not made.threshold.requires_grad


@pytest.mark.parametrize("options", [{}, {"target_k": 2.0, "control": "loss"}, {"published": True}])
def test_thresholds_that_learn_are_not_steered(options):
    made = router(max_experts=4, **options)
    made.update_thresholds(torch.tensor([9, 0, 0, 0]), torch.tensor(9))
    assert not made.threshold.any()
    assert made.threshold.requires_grad


def test_no_tokens_steer_nothing():
    made = router(max_experts=4, target_k=2.0)
    made.update_thresholds(torch.zeros(4), torch.tensor(0))
    assert not made.threshold.any()


def test_the_target_k_loss_drives_the_mean_to_the_target():
    losses = LossWeights(target_k=1.0)
    made = router(16, max_experts=6, target_k=1.5, control="loss", losses=losses)
    optimizer = torch.optim.Adam([made.threshold], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(150):
        x = torch.randn(400, 16, generator=generator)
        routing = made(x)
        assert list(routing.losses) == ["target_k"]
        seen.append(float((made.cosine(x) > made.threshold).sum()) / 400)
        optimizer.zero_grad()
        routing.losses["target_k"].backward()
        optimizer.step()
    assert seen[0] > 2.5
    assert sum(seen[-20:]) / 20 == pytest.approx(1.5, rel=0.05)


def test_a_target_to_hold_by_loss_has_a_coefficient_even_if_none_is_given():
    made = router(max_experts=4, target_k=1.0, control="loss", losses=LossWeights())
    routing = made(normal(50, 8))
    mean = float((made.cosine(normal(50, 8)) > 0).sum()) / 50
    assert float(routing.losses["target_k"].detach()) == pytest.approx(0.01 * (mean - 1) ** 2)


# ---- evaluation, precision, randomness ---------------------------------------------------------


@pytest.mark.parametrize("options", EDGES)
def test_a_tokens_output_does_not_depend_on_the_others(options):
    layer = double_layer() if not options else small_layer(5, 4, 6, **options).double()
    layer.eval()
    x = normal(30, 6, dtype=torch.float64)
    whole = layer(x)
    alone = torch.cat([layer(x[t : t + 1]) for t in range(30)])
    torch.testing.assert_close(whole, alone, atol=1e-12, rtol=1e-10)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x[order]), whole[order], atol=1e-12, rtol=1e-10)


def test_half_precision_is_routed_in_single():
    made = router(max_experts=4, weights="score")
    x = normal(40, 8).bfloat16()
    half, single = made(x), made(x.float())
    assert same_rows(half, single)
    assert half.weights.dtype == torch.float32
    assert half.weights.equal(single.weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made(x.float())
    assert cast.weights.equal(single.weights)
    assert all(value.equal(cast.losses[name]) for name, value in single.losses.items())


@pytest.mark.parametrize("closed", ["zero", "mean"])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_a_layer_trains_in_half_precision(how, closed):
    layer = small_layer(4, 3, 16, closed_gates=closed, losses=EVERY_LOSS).train()
    x = normal(2, 30, 16)
    if how == "weights":
        layer, x = layer.bfloat16(), x.bfloat16()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    total = y.float().square().mean() + sum(layer.take_losses().values(), torch.zeros(()))
    total.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad[:3].any(), name


@pytest.mark.parametrize("options", [{}, {"published": True}, {"target_k": 1.5}])
def test_the_global_generator_is_neither_seeded_nor_drawn_from(options):
    before = torch.random.get_rng_state()
    made = router(max_experts=4, **({"calibration": None} | options))
    made(normal(20, 8))
    made.eval()(normal(20, 8))
    made.update_thresholds(torch.ones(4), torch.tensor(4))
    assert torch.random.get_rng_state().equal(before)


def test_the_seed_decides_the_rows():
    first, second, third = (router(16, seed, max_experts=4).similarity for seed in (1, 1, 2))
    assert first.equal(second)
    assert not torch.allclose(first, third)
    torch.testing.assert_close(first @ first.t(), torch.eye(4))


def test_more_slots_than_dimensions_are_orthogonal_in_groups():
    rows = router(3, max_experts=5).similarity.detach()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(rows[:3] @ rows[:3].t(), torch.eye(3))


def test_state_keeps_slots_thresholds_and_calibration():
    made = router(16, max_experts=6, calibration=2)
    made(normal(100, 16))
    made.active[1] = False
    again = router(16, 5, max_experts=6, calibration=2)
    again.load_state_dict(made.state_dict())
    for batch in range(3):
        x = normal(100, 16, seed=batch)
        assert made(x).weights.equal(again(x).weights)
    assert made.threshold.equal(again.threshold)
    assert set(made.state_dict()) == {"similarity", "threshold", "active", "calibrated"}


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_experts": 0}, "max_experts must be at least 1, got 0"),
        ({"max_experts": -3}, "max_experts must be at least 1, got -3"),
        ({"max_experts": 4, "start_experts": 5}, r"start_experts must be between 1 .*\(4\), got 5"),
        ({"start_experts": 0}, "start_experts must be between 1"),
        ({"start_k": 0.0}, "start_k must be above 0"),
        ({"max_experts": 4, "target_k": 4.5}, r"target_k must be above 0 .*\(4\), got 4.5"),
        ({"target_k": float("nan")}, "target_k must be above 0"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"rate": -0.1}, "rate must be at least 0"),
        ({"calibration": -1}, "calibration must be at least 0"),
        ({"weights": "sum"}, 'weights must be one of score, softmax, uniform, got "sum"'),
        ({"closed_gates": "open"}, 'closed_gates must be one of zero, mean, none, got "open"'),
        ({"control": "pid", "target_k": 1.0}, 'control must be one of threshold, loss, got "pid"'),
        ({"control": "loss"}, 'control="loss" needs a target_k'),
        ({"losses": {"target_k": 0.1}}, 'needs a target_k and control="loss"'),
        ({"losses": {"balanse": 0.1}}, 'losses has no option "balanse"; did you mean "balance"'),
        ({"losses": 0.1}, "losses must be a mapping of options, got 0.1"),
        ({"adapt": {"evry": 10}}, 'adapt has no option "evry"; did you mean "every"'),
        ({"max_expert": 4}, 'TopAny has no option "max_expert"; did you mean "max_experts"'),
        ({"published": True, "target_k": 1.0}, "published=True has no target_k"),
        ({"published": True, "weights": "score"}, "published=True fixes weights to 'uniform'"),
        ({"published": True, "scale": 2.0}, "published=True fixes scale to 1.0"),
        ({"width": 0}, "width must be at least 1"),
        ({"init": "twin"}, 'init must be "fresh" or "copy", got "twin"'),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        TopAny(**options)


def test_options_of_each_rule():
    published = TopAny(published=True).options
    assert (published.scale, published.weights, published.closed_gates) == (1.0, "uniform", "none")
    assert published.losses == PUBLISHED_LOSSES
    assert published.calibration == 0
    assert TopAny(max_experts=1).options.start_k == 1
    assert TopAny(target_k=2.0).options.control == "threshold"
    assert TopAny(losses={"z": 0.1}).options.losses == LossWeights(z=0.1)
    assert router(16).scale == 4.0
    assert router(16, scale=3.0).scale == 3.0


@pytest.mark.parametrize("options", [{}, {"published": True}, {"max_experts": 1}, {"target_k": 2}])
def test_options_survive_as_plain_data(options):
    method = TopAny(**options)
    assert TopAny.from_dict(method.to_dict()).options == method.options
