from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routers import map_of, normal, routes_in_single
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts import losses
from sparing.experts.controller import ExpertController
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer
from sparing.experts.losses import LossWeights
from sparing.experts.top_p import TopP, TopPOptions, TopPRouter


def router(dim: int = 8, seed: int = 0, **options: Any) -> TopPRouter:
    return TopPRouter(dim, TopPOptions(**options), seed).train()


def with_logits(logits: Tensor, **options: Any) -> TopPRouter:
    """A router whose logits for tokens torch.eye(T) are ``logits``: (T, E)."""
    made = router(logits.shape[0], experts=logits.shape[1], **options).double()
    with torch.no_grad():
        made.similarity.copy_(logits.t())
    return made


def reference(
    score: list[float], p: float, max_k: int | None = None, normalize: bool = False
) -> list[float]:
    """One token's weights by the definition, in plain Python."""
    order = sorted(range(len(score)), key=lambda e: (-score[e], e))
    taken, total = [], 0.0
    for expert in order[:max_k]:
        taken.append(expert)
        total += score[expert]
        if total > p and p < 1:
            break
    scale = total if normalize else 1.0
    return [score[e] / scale if e in taken else 0.0 for e in range(len(score))]


@pytest.mark.parametrize("p", [1e-6, 0.2, 0.4, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("max_k", [None, 1, 3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_experts_up_to_the_first_that_passes_p(p, max_k, normalize, training):
    made = router(experts=6, p=p, max_k=max_k, normalize=normalize).double().train(training)
    x = 2 * normal(40, 8, dtype=torch.float64)
    routing = made(x)
    score = torch.softmax(x @ made.similarity.detach().t(), 1)
    expected = [reference(row, p, max_k, normalize) for row in score.tolist()]
    torch.testing.assert_close(
        map_of(routing, 40, 6), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert bool(routing.losses) == training


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.integers(-6, 6), min_size=5, max_size=5), min_size=1, max_size=6
    ),  # whole logits make exact ties
    p=st.floats(0.01, 0.99),
)
def test_ties_go_by_the_order_of_experts(rows, p):
    logits = torch.tensor(rows, dtype=torch.float64)
    routing = with_logits(logits, p=p).eval()(torch.eye(len(rows), dtype=torch.float64))
    found = map_of(routing, *logits.shape)
    for row, weights in zip(logits.softmax(1).tolist(), found.tolist(), strict=True):
        assert sum(w > 0 for w in weights) == sum(w > 0 for w in reference(row, p)) or any(
            # a cumulative sum that equals p but for rounding may go either way
            abs(sum(sorted(row, reverse=True)[:k]) - p) < 1e-12
            for k in range(1, 6)
        )
        taken = [e for e, w in enumerate(weights) if w > 0]
        for e in taken:
            assert all(o in taken for o in range(5) if row[o] > row[e])
            assert all(o in taken for o in range(e) if row[o] == row[e])


def test_the_ends_of_p():
    x = normal(50, 8)
    assert router(experts=5, p=1.0)(x).k.tolist() == [5] * 50
    assert router(experts=5, p=1e-9)(x).k.tolist() == [1] * 50
    # sums of float32 probabilities may pass 1 before the last expert, or reach it
    sure = with_logits(torch.tensor([[60.0, 1.0, 0.0], [0.3, 0.1, 0.2]]), p=1.0).float()
    assert sure(torch.eye(2)).k.tolist() == [3, 3]
    even = with_logits(torch.zeros(1, 4), p=0.5)
    # 0.25 + 0.25 reaches 0.5 and does not pass it
    assert even(torch.eye(1, dtype=torch.float64)).experts.tolist() == [0, 1, 2]


def test_gradients_are_those_of_autograd():
    for normalize in (False, True):
        made = router(6, experts=5, p=0.6, normalize=normalize, losses={}).double()
        x = 2 * normal(20, 6, dtype=torch.float64)
        upstream = normal(20, 5, seed=1, dtype=torch.float64)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        routing = made(ours)
        (routing.weights * upstream[routing.tokens, routing.experts]).sum().backward()
        rows = made.similarity.detach().clone().requires_grad_()
        score = (theirs @ rows.t()).softmax(1)
        taken = torch.tensor([reference(row, 0.6) for row in score.tolist()]) > 0
        kept = score * taken
        weights = kept / kept.sum(1, keepdim=True) if normalize else kept
        (weights * upstream).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9)
        torch.testing.assert_close(made.similarity.grad, rows.grad, rtol=0, atol=1e-9)


def test_padding_gets_no_rows_and_changes_no_other():
    made = router(experts=4, losses=LossWeights(balance=1, z=1, entropy=1))
    x, mask = normal(40, 8), normal(40, seed=1) > 0
    padded, alone = made(x, mask), made(x[mask])
    assert not padded.k[~mask].any()
    torch.testing.assert_close(map_of(padded, 40, 4)[mask], map_of(alone, len(alone.k), 4))
    assert set(padded.losses) == {"balance", "entropy", "z"}
    for name, value in padded.losses.items():
        torch.testing.assert_close(value, alone.losses[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("target_k", [None, 2.0])
def test_no_real_token_gives_no_rows(tokens, training, target_k):
    every = LossWeights(balance=1, z=1, entropy=1)
    made = router(experts=4, target_k=target_k, losses=every).train(training)
    x = normal(tokens, 8).requires_grad_()
    routing = made(x, torch.zeros(tokens, dtype=torch.bool))
    assert routing.rows == 0
    total = routing.weights.sum() + sum(routing.losses.values(), torch.zeros(()))
    total.backward()
    assert made.similarity.grad is not None
    assert not made.similarity.grad.any()
    made.update_thresholds(routing.counts, torch.tensor(0))
    if target_k is not None:
        assert int(made.calibrated) == 0
        assert float(made.p) == pytest.approx(0.4)


def test_inactive_slots_are_never_taken():
    made = router(experts=5, p=1.0, losses=LossWeights(balance=1, z=1, entropy=1))
    made.active[[0, 4]] = False
    routing = made(normal(30, 8))
    assert routing.counts.tolist() == [0, 30, 30, 30, 0]
    total = (routing.weights * normal(90)).sum() + sum(routing.losses.values())
    total.backward()
    assert made.similarity.grad is not None
    assert torch.isfinite(made.similarity.grad).all()
    assert not made.similarity.grad[[0, 4]].any()
    assert made.similarity.grad[1:4].any(1).all()


@pytest.mark.parametrize("target_k", [None, 2.0])
def test_a_tokens_routing_does_not_depend_on_the_others(target_k):
    made = router(6, experts=5, target_k=target_k).double()
    x = 2 * normal(30, 6, dtype=torch.float64)
    made(x)  # calibrates
    made.eval()
    whole = map_of(made(x), 30, 5)
    alone = torch.cat([map_of(made(x[t : t + 1]), 1, 5) for t in range(30)])
    torch.testing.assert_close(whole, alone)


def test_half_precision_is_routed_in_single():
    routes_in_single(router(experts=4, p=0.7))


def test_the_entropy_loss_is_that_of_the_definition_and_sharpens():
    made = router(experts=4, p=0.9, losses=LossWeights(entropy=1.0))
    made.active[3] = False
    x = normal(50, 8)
    score = torch.softmax(x @ made.similarity.detach()[:3].t(), 1).double()
    value = made(x).losses["entropy"]
    assert float(value.detach()) == pytest.approx(
        float(-(score * score.log()).sum(1).mean()), rel=1e-5
    )
    first = made(x).k.double().mean()
    optimizer = torch.optim.SGD([made.similarity], lr=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        made(x).losses["entropy"].backward()
        optimizer.step()
    assert made(x).k.double().mean() < first - 0.3
    # a probability that underflows is no NaN, forward or backward
    logits = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    entropy = losses.entropy(logits, torch.ones(3, dtype=torch.bool))
    entropy.backward()
    assert float(entropy.detach()) == 0.0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_balance_loss_of_a_skewed_router_has_a_gradient_that_evens_the_load():
    made = router(experts=4, p=0.3, losses=LossWeights(balance=1.0))
    x = normal(256, 8) + 1
    first = made(x).counts
    optimizer = torch.optim.SGD([made.similarity], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        made(x).losses["balance"].backward()
        assert made.similarity.grad is not None
        assert made.similarity.grad.norm() > 0
        optimizer.step()
    last = made(x).counts
    assert float(first.max() / first.sum()) > 0.45
    assert float(last.max() / last.sum()) < 0.35


# ---- the controller ------------------------------------------------------------------------------


def test_calibration_starts_at_the_target():
    made = router(16, experts=8, target_k=2.5, calibration=2)
    for seed in range(3):
        k = made(normal(500, 16, seed=seed)).k.double().mean()
        assert float(k) == pytest.approx(2.5, abs=0.15 if seed else 0.01)
    assert int(made.calibrated) == 2
    kept = made.level.clone()
    made(3 * normal(500, 16, seed=9))
    assert made.level.equal(kept)
    before = router(16, experts=8, target_k=2.5, calibration=0, p=0.3)
    before(normal(500, 16))
    assert float(before.p) == pytest.approx(0.3)


@pytest.mark.parametrize("target", [1.2, 2.0, 4.0])
@pytest.mark.parametrize("sharpening", [1.0, 1.005, 0.995])
def test_the_controller_holds_its_target_while_the_router_drifts(target, sharpening):
    layer = layer_of(TopP(experts=8, target_k=target, calibration=0, p=0.5))
    controller = ExpertController([("layer", layer)])
    found = []
    for step in range(1, 161):
        with torch.no_grad():
            layer.router.similarity.mul_(sharpening)
        layer(normal(256, 16, seed=step))
        found.append(float(layer.record.load.sum()) / 256)
        controller.step(step)
    late = torch.tensor(found[100:])
    assert float(late.mean()) == pytest.approx(target, rel=0.06)
    assert float(late.std()) < 0.12 * target


def layer_of(method: TopP, dim: int = 16) -> ExpertLayer:
    experts = Experts(dim, 24, method.slots)
    experts.init_(generator=torch.Generator().manual_seed(0))
    return ExpertLayer(method.router(dim), experts).train()


def test_the_controller_is_bounded_and_saved():
    made = router(experts=4, target_k=2.0, calibration=0)
    for _ in range(500):
        made.update_thresholds(torch.tensor([40, 40, 40, 40]), torch.tensor(40))
    assert 0 < float(made.p) < 1e-5
    assert made(normal(30, 8)).k.tolist() == [1] * 30
    for _ in range(1000):
        made.update_thresholds(torch.zeros(4), torch.tensor(40))
    assert 1 - 1e-5 < float(made.p) < 1
    other = router(experts=4, target_k=2.0)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    for one in (made, other):
        one.update_thresholds(torch.tensor([30, 20, 10, 10]), torch.tensor(40))
    assert made.p.equal(other.p)
    assert {"level", "error", "calibrated"} <= set(made.state_dict())
    assert "level" not in router(experts=4).state_dict()


def test_missing_experts_do_not_lower_the_target():
    layer = layer_of(TopP(experts=8, target_k=2.0, p=0.5))
    layer.router.active[4:] = False
    controller = ExpertController([("layer", layer)])
    found = []
    for step in range(1, 60):
        layer(normal(256, 16, seed=step))
        found.append(float(layer.record.load.sum()) / 256)
        controller.step(step)
    assert sum(found[30:]) / len(found[30:]) == pytest.approx(2.0, rel=0.05)


def test_slots_and_expected_load():
    method = TopP(experts=6, p=0.5)
    assert method.slots == 6
    assert method.expected_k == TopP(experts=6, p=0.5).expected_k
    seen = router(32, experts=6, p=0.5)(normal(4000, 32)).k.double().mean()
    assert method.expected_k == pytest.approx(float(seen), rel=0.1)
    assert TopP(target_k=3).expected_k == 3.0
    assert TopP(experts=6, p=1).expected_k == 6.0
    assert TopP(experts=6, p=1, max_k=2).expected_k == 2.0
    made = method.router(8)
    assert made.slots() == {"similarity": made.similarity}
    assert not made.tracks_outputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts must be at least 1, got 0"),
        ({"p": 0}, "p must be above 0"),
        ({"p": 1.1}, r"p must be in \[0, 1\], got 1.1"),
        ({"p": float("nan")}, "p must be"),
        ({"p": "half"}, "p must be a number"),
        ({"max_k": 9}, r"max_k must be at most experts \(8\), got 9"),
        ({"max_k": 0}, "max_k must be at least 1"),
        ({"target_k": 0.5}, r"target_k must be in \[1, 8\], got 0.5"),
        ({"target_k": 3, "max_k": 2}, r"target_k must be in \[1, 2\], got 3"),
        ({"integral": -1}, "integral must be at least 0"),
        ({"calibration": 1.5}, "calibration must be a whole number"),
        ({"losses": {"simplicity": 0.1}}, "no simplicity loss; its losses: balance, entropy, z"),
        ({"losses": {"entropi": 0.1}}, 'losses has no option "entropi"; did you mean "entropy"'),
        ({"expert": 4}, 'TopP has no option "expert"; did you mean "experts"'),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        TopP(**options)


def test_options_survive_as_plain_data():
    method = TopP(experts=4, p=0.3, losses={"z": 0.1})
    assert method.options.losses == LossWeights(z=0.1)
    assert TopP.from_dict(method.to_dict()).options == method.options
    assert TopP().options.losses == LossWeights(balance=0.01, entropy=1e-4)
    assert TopP(target_k=2).options.losses == LossWeights(balance=0.01)
