from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routers import map_of, normal, routes_in_single

from sparing.core.errors import RequestError
from sparing.experts.controller import ExpertController
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer
from sparing.experts.relu import ReLUGates, ReLUOptions, ReLURouter

CASES: list[dict[str, Any]] = [
    {},
    {"fallback": "zero"},
    {"normalize": True},
    {"penalty": "plain", "start": "calibrated"},
]


def router(dim: int = 8, seed: int = 0, **options: Any) -> ReLUGates:
    return ReLUGates(dim, ReLUOptions(**options), seed).train()


def layer_of(method: ReLURouter, dim: int = 16) -> ExpertLayer:
    experts = Experts(dim, 24, method.slots)
    experts.init_(generator=torch.Generator().manual_seed(0))
    return ExpertLayer(method.router(dim), experts, name="layer").train()


def reference(row: list[float], fallback: str, normalize: bool) -> list[float]:
    """One token's weights from its logits by the definition, in plain Python."""
    weights = [max(value, 0.0) for value in row]
    if not any(weights) and fallback == "best":
        best = max(range(len(row)), key=lambda e: (row[e], -e))
        weights[best] = float(torch.sigmoid(torch.tensor(row[best], dtype=torch.float64)))
    total = sum(weights) if normalize and any(weights) else 1.0
    return [value / total for value in weights]


@pytest.mark.parametrize("fallback", ["best", "zero"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_positive_gate_is_the_weight(fallback, normalize, training):
    made = router(experts=4, fallback=fallback, normalize=normalize).double().train(training)
    x = normal(60, 8, dtype=torch.float64)
    routing = made(x)
    logits = x @ made.similarity.detach().t()
    expected = [reference(row, fallback, normalize) for row in logits.tolist()]
    torch.testing.assert_close(
        map_of(routing, 60, 4), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert routing.unserved is not None
    closed = ~(logits > 0).any(1)
    assert 0 < int(closed.sum()) < 30
    assert routing.unserved.equal(closed)
    assert routing.k.equal((logits > 0).sum(1) + (closed if fallback == "best" else 0))
    assert bool(routing.losses) == training


def test_gradients_are_those_of_autograd():
    for fallback in ("best", "zero"):
        for normalize in (False, True):
            made = router(6, experts=3, fallback=fallback, normalize=normalize).double()
            x = normal(40, 6, dtype=torch.float64)
            upstream = normal(40, 3, seed=1, dtype=torch.float64)
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            routing = made(ours)
            (routing.weights * upstream[routing.tokens, routing.experts]).sum().backward()
            rows = made.similarity.detach().clone().requires_grad_()
            logits = theirs @ rows.t()
            weights = logits.relu()
            if fallback == "best":
                best = logits.argmax(1, keepdim=True)
                forced = torch.zeros_like(weights).scatter(1, best, 1.0)
                forced = forced * ~(logits > 0).any(1, keepdim=True)
                weights = weights + forced * logits.sigmoid()
            if normalize:
                total = weights.sum(1, keepdim=True)
                weights = weights / torch.where(total > 0, total, 1.0)
            (weights * upstream).sum().backward()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9)
            torch.testing.assert_close(made.similarity.grad, rows.grad, rtol=0, atol=1e-9)


def test_a_token_without_an_open_gate_can_learn_to_open_one():
    for fallback in ("best", "zero"):
        made = router(3, experts=2, fallback=fallback)
        with torch.no_grad():
            made.similarity.copy_(torch.tensor([[-1.0, 0, 0], [-2.0, 0, 0]]))
        x = torch.tensor([[1.0, 0, 0]])
        optimizer = torch.optim.SGD([made.similarity], lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            routing = made(x)
            (-routing.weights.sum()).backward()
            optimizer.step()
        opened = not bool(made(x).unserved.any())
        assert opened == (fallback == "best")


@pytest.mark.parametrize("options", CASES)
def test_padding_gets_no_rows_and_changes_no_other(options):
    made, other = router(experts=4, **options), router(experts=4, **options)
    x, mask = normal(40, 8), normal(40, seed=1) > 0
    padded, alone = made(x, mask), other(x[mask])
    assert not padded.k[~mask].any()
    assert not padded.unserved[~mask].any()
    torch.testing.assert_close(map_of(padded, 40, 4)[mask], map_of(alone, len(alone.k), 4))
    torch.testing.assert_close(padded.losses["l1"], alone.losses["l1"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("options", CASES)
def test_no_real_token_gives_no_rows(options, tokens, training):
    made = router(experts=4, **options).train(training)
    x = normal(tokens, 8).requires_grad_()
    routing = made(x, torch.zeros(tokens, dtype=torch.bool))
    assert routing.rows == 0
    total = routing.weights.sum() + sum(routing.losses.values(), torch.zeros(()))
    total.backward()
    assert made.similarity.grad is not None
    assert not made.similarity.grad.any()
    coefficient = made.coefficient.clone()
    made.update_thresholds(routing.counts, torch.tensor(0))
    assert made.coefficient.equal(coefficient)
    assert int(made.calibrated) == 0


@pytest.mark.parametrize("options", CASES)
def test_inactive_slots_are_never_taken(options):
    made = router(experts=5, coefficient=1.0, **options)
    made.active[[0, 4]] = False
    routing = made(normal(60, 8))
    assert routing.counts[[0, 4]].tolist() == [0, 0]
    assert routing.counts[1:4].all()
    total = (routing.weights * normal(routing.rows)).sum() + routing.losses["l1"]
    total.backward()
    for parameter in made.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert not parameter.grad[[0, 4]].any()
        assert (parameter.grad[1:4] != 0).reshape(3, -1).any(1).all()


@pytest.mark.parametrize("options", CASES)
def test_a_tokens_routing_does_not_depend_on_the_others(options):
    made = router(6, experts=5, **options).double()
    x = normal(30, 6, dtype=torch.float64)
    made(x)
    made.eval()
    whole = map_of(made(x), 30, 5)
    alone = torch.cat([map_of(made(x[t : t + 1]), 1, 5) for t in range(30)])
    torch.testing.assert_close(whole, alone)


def test_half_precision_is_routed_in_single():
    routes_in_single(router(experts=4))


# ---- the penalty ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 12), target=st.floats(0.1, 4), seed=st.integers(0, 99))
def test_the_penalty_is_that_of_the_paper(tokens, target, seed):
    x = normal(tokens, 8, seed=seed, dtype=torch.float64)
    for penalty in ("balanced", "plain"):
        made = router(experts=4, target_k=target, penalty=penalty, coefficient=0.5).double()
        gates = (x @ made.similarity.detach().t()).relu()
        expected = 0.0
        for expert in range(4):
            share = int((gates[:, expert] > 0).sum()) * 4 / (target * tokens)
            factor = share if penalty == "balanced" else 1.0
            expected += 0.5 * factor * float(gates[:, expert].sum()) / tokens
        assert float(made(x).losses["l1"].detach()) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_balanced_penalty_presses_on_the_busiest_most():
    pressed = {}
    for penalty in ("balanced", "plain"):
        made = router(4, experts=2, penalty=penalty, coefficient=1.0)
        with torch.no_grad():
            made.similarity.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        # the first expert is open for all tokens, the second for one
        x = torch.tensor([[1.0, 1, 0, 0], [1, -1, 0, 0], [1, -1, 0, 0], [1, -1, 0, 0]])
        made(x).losses["l1"].backward()
        grad = made.similarity.grad
        assert grad is not None
        assert float(grad[0, 0]) > 0
        pressed[penalty] = float(grad[0, 0] / grad[1, 1])
    assert pressed["balanced"] == pytest.approx(4 * pressed["plain"])


def test_the_coefficient_follows_the_load_and_stays_in_bounds():
    made = router(experts=4, target_k=2.0, coefficient=0.01, factor=1.5, least=1e-3, most=1.0)
    load, tokens = torch.tensor([30, 30, 30, 30]), torch.tensor(40)
    made.update_thresholds(load, tokens)
    assert float(made.coefficient) == pytest.approx(0.015)
    made.update_thresholds(load // 3, tokens)
    assert float(made.coefficient) == pytest.approx(0.01)
    made.update_thresholds(torch.tensor([20] * 4), tokens)
    assert float(made.coefficient) == pytest.approx(0.01), "on target it stays"
    for _ in range(50):
        made.update_thresholds(load, tokens)
    assert float(made.coefficient) == pytest.approx(1.0)
    saved = copy.deepcopy(made.state_dict())
    for _ in range(50):
        made.update_thresholds(0 * load, tokens)
    assert float(made.coefficient) == pytest.approx(1e-3)
    made.load_state_dict(saved)
    assert float(made.coefficient) == pytest.approx(1.0)


def test_rows_of_the_fallback_do_not_count_towards_the_target():
    layer = layer_of(ReLURouter(experts=4, target_k=1.0, coefficient=0.01))
    with torch.no_grad():
        layer.router.similarity.copy_(-layer.router.similarity.abs())
    layer(normal(50, 16).abs())
    assert int(layer.record.unserved) == 50
    assert int(layer.record.load.sum()) == 50  # one row each
    ExpertController([("layer", layer)]).step(1)
    assert float(layer.router.coefficient) == pytest.approx(0.01 / 1.2)


@pytest.mark.parametrize("start", ["half", "calibrated"])
@pytest.mark.parametrize("penalty", ["balanced", "plain"])
def test_the_penalty_holds_the_target_in_training(start, penalty):
    method = ReLURouter(experts=8, target_k=2.0, start=start, penalty=penalty, coefficient=1e-3)
    layer = layer_of(method)
    controller = ExpertController([("layer", layer)])
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    maps = normal(16, 16, seed=5) / 4
    mean_k = []
    for step in range(1, 301):
        # a common direction, as hidden states have: gates without an offset need one to close
        x = normal(256, 16, seed=step) + 0.5
        optimizer.zero_grad()
        loss = (layer(x) - torch.where(x[:, :1] > 0, x @ maps, -x)).square().mean()
        (loss + layer.take_losses()["l1"]).backward()
        optimizer.step()
        record = layer.record
        mean_k.append(float(record.load.sum() - record.fallback.sum()) / 256)
        controller.step(step)
    assert mean_k[0] == pytest.approx(4.0 if start == "half" else 2.0, abs=1.0)
    late = torch.tensor(mean_k[200:])
    assert float(late.mean()) == pytest.approx(2.0, abs=0.6)
    assert (layer.router.coefficient < method.options.most).item()


def test_calibration_opens_the_target():
    made = router(16, experts=8, target_k=3.0, start="calibrated", calibration=2)
    for seed in range(3):
        k = made(normal(500, 16, seed=seed) + 1).k.double().mean()
        assert float(k) == pytest.approx(3.0, abs=0.25 if seed else 0.15)
    assert int(made.calibrated) == 2
    assert made.offset is not None
    kept = made.offset.detach().clone()
    made(3 * normal(500, 16))
    assert made.offset.equal(kept)
    assert set(made.slots()) == {"similarity", "offset"}
    assert "offset" not in router().state_dict()


def test_slots_and_expected_load():
    method = ReLURouter(experts=6, target_k=3)
    assert (method.slots, method.expected_k) == (6, 3.0)
    assert ReLURouter(target_k=0.5).expected_k == 1.0
    assert ReLURouter(target_k=0.5, fallback="zero").expected_k == 0.5
    made = method.router(8)
    assert made.slots() == {"similarity": made.similarity}
    assert not made.tracks_outputs
    assert float(made(normal(500, 8)).k.double().mean()) == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts must be at least 1, got 0"),
        ({"target_k": 0}, "target_k must be above 0"),
        ({"target_k": 9}, r"target_k must be in \[0, 8\], got 9"),
        ({"target_k": float("nan")}, "target_k must be in"),
        ({"penalty": "l2"}, 'penalty must be one of balanced, plain, got "l2"'),
        ({"fallback": "mean"}, "fallback must be one of best, zero"),
        ({"start": "full"}, "start must be one of half, calibrated"),
        ({"factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"least": 0}, "least must be above 0"),
        ({"most": 1e-12}, "most must be at least 1e-10"),
        ({"coefficient": 100}, r"coefficient must be in \[1e-10, 10\], got 100"),
        ({"calibration": 0}, "calibration must be at least 1, got 0"),
        ({"expert": 4}, 'ReLURouter has no option "expert"; did you mean "experts"'),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        ReLURouter(**options)


def test_options_survive_as_plain_data():
    method = ReLURouter(experts=4, target_k=1.5, start="calibrated")
    assert ReLURouter.from_dict(method.to_dict()).options == method.options
