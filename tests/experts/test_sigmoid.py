"""Sigmoid top-k against a plain loop in float64, and its bias against the published rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts.controller import ExpertController
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer
from sparing.experts.losses import LossWeights
from sparing.experts.sigmoid import SigmoidTopK, SigmoidTopKOptions, SigmoidTopKRouter


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def router(dim: int = 6, seed: int = 0, **options: Any) -> SigmoidTopKRouter:
    return SigmoidTopKRouter(dim, SigmoidTopKOptions(**options), seed).double().train()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("groups", [None, 3])
def test_outputs_and_gradients_are_those_of_a_plain_loop(k, normalize, groups):
    grouped = {} if groups is None else {"groups": 3, "groups_kept": 2}
    every = LossWeights(balance=0.3, z=0.1)
    made = router(experts=6, k=k, normalize=normalize, scale=2.5, losses=every, **grouped)
    bias = 0.2 * normal(6, seed=7)
    made.bias.copy_(bias)
    x, upstream = normal(14, 6, seed=1), normal(14, 6, seed=2)
    ours = x.clone().requires_grad_()
    routing = made(ours)
    total = (routing.weights * upstream[routing.tokens, routing.experts]).sum()
    (total + sum(routing.losses.values())).backward()

    rows, theirs = made.similarity.detach().clone().requires_grad_(), x.clone().requires_grad_()
    weights: dict[tuple[int, int], Tensor] = {}
    shares, z = [], 0.0
    for t in range(14):
        logits = rows @ theirs[t]
        score = 1 / (1 + torch.exp(-logits))
        ranking = (score.detach() + bias).tolist()
        allowed = range(6)
        if groups is not None:  # DeepSeek-V3: two experts a group, worth the sum of both
            worth = [ranking[2 * g] + ranking[2 * g + 1] for g in range(3)]
            best = sorted(range(3), key=lambda g, w=worth: -w[g])[:2]
            allowed = [e for e in range(6) if e // 2 in best]
        taken = sorted(allowed, key=lambda e, r=ranking: -r[e])[:k]
        for e in taken:
            divisor = sum(score[i] for i in taken) if normalize else 1
            weights[t, e] = 2.5 * score[e] / divisor
        shares.append(score / score.sum())
        z = z + logits.exp().sum().log() ** 2 / 14
    fraction = [sum(1 for _, e in weights if e == expert) / len(weights) for expert in range(6)]
    mean = sum(shares) / 14
    expected = {"balance": 0.3 * 6 * sum(fraction[e] * mean[e] for e in range(6)), "z": 0.1 * z}
    for name, value in expected.items():
        torch.testing.assert_close(routing.losses[name], value, rtol=1e-9, atol=1e-12)
    pairs = list(zip(routing.tokens.tolist(), routing.experts.tolist(), strict=True))
    assert set(pairs) == set(weights)
    for pair, weight in zip(pairs, routing.weights, strict=True):
        torch.testing.assert_close(weight, weights[pair], rtol=1e-9, atol=1e-12)
    (sum(weights[p] * upstream[p] for p in weights) + sum(expected.values())).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(made.similarity.grad, rows.grad, rtol=1e-6, atol=1e-9)


def test_the_bias_decides_the_choice_and_never_the_weight():
    made, x = router(experts=4, k=2, normalize=False), normal(50, 6)
    made.bias[3] = 5.0
    routing = made(x)
    assert int(routing.counts[3]) == 50
    score = torch.sigmoid(x @ made.similarity.detach().t())
    torch.testing.assert_close(
        routing.weights.detach(), score[routing.tokens, routing.experts], rtol=1e-12, atol=0
    )
    assert "bias" in made.state_dict()
    assert "bias" not in dict(made.named_parameters())


def test_the_sign_rule_is_the_published_one_less_its_mean():
    made = router(experts=5, k=1, rate=0.01)
    load = torch.tensor([10, 4, 4, 1, 1])
    made.update_thresholds(load, torch.tensor(20))
    step = [-0.01, 0.0, 0.0, 0.01, 0.01]  # u * sign(mean - load), the mean being 4
    expected = torch.tensor([s - 0.01 / 5 for s in step], dtype=torch.float64)
    torch.testing.assert_close(made.bias, expected)
    assert float(made.bias.sum()) == pytest.approx(0, abs=1e-12)


def test_the_proportional_rule_is_bounded_by_the_rate():
    made = router(experts=4, k=1, rate=0.1, update="proportional")
    made.update_thresholds(torch.tensor([10, 5, 5, 0]), torch.tensor(20))
    torch.testing.assert_close(made.bias, torch.tensor([-0.1, 0.0, 0.0, 0.1], dtype=torch.float64))
    made.bias.zero_()
    made.update_thresholds(torch.tensor([20, 0, 0, 0]), torch.tensor(20))
    torch.testing.assert_close(
        made.bias, torch.tensor([-0.15, 0.05, 0.05, 0.05], dtype=torch.float64)
    )


def test_inactive_slots_neither_count_nor_move():
    made = router(experts=4, k=1, rate=0.1)
    made.active[1] = False
    made.bias[1] = 0.7
    made.update_thresholds(torch.tensor([6, 0, 3, 0]), torch.tensor(9))
    torch.testing.assert_close(made.bias, torch.tensor([-0.1, 0.7, 0.0, 0.1], dtype=torch.float64))


def test_without_tokens_or_rate_nothing_moves():
    for options, tokens in (({}, 0), ({"rate": 0.0}, 9)):
        made = router(experts=3, k=1, **options)
        made.update_thresholds(torch.tensor([9, 0, 0]), torch.tensor(tokens))
        assert made.bias.tolist() == [0.0] * 3


@pytest.mark.parametrize("update", ["sign", "proportional"])
def test_a_skewed_router_is_balanced_without_any_gradient(update):
    method = SigmoidTopK(experts=8, k=2, rate=0.01, update=update)
    experts = Experts(6, 4, 8)
    experts.init_(generator=torch.Generator().manual_seed(0))
    layer = ExpertLayer(method.router(6), experts, name="layer").train()
    with torch.no_grad():
        layer.router.similarity[0] += 1.0
    x = normal(1, 400, 6).float() + 0.5
    rows = layer.router.similarity.detach().clone()
    controller = ExpertController([("layer", layer)])
    loads = []
    for step in range(1, 200):
        layer(x)
        loads.append(layer.record.load.clone())
        controller.step(step)
    assert int(loads[0].max()) > 2.5 * 100
    assert int(loads[-1].max()) < 1.3 * 100
    assert int(loads[-1].min()) > 0.7 * 100
    assert layer.router.similarity.equal(rows)
    assert abs(float(layer.router.bias.mean())) < 1e-6


def test_recomputation_and_evaluation_leave_the_bias():
    made, x = router(experts=4), normal(20, 6)
    made(x)
    made.eval()(x)
    assert made.bias.tolist() == [0.0] * 4


def test_an_optional_balance_loss_has_a_gradient_on_a_skewed_router():
    made = router(experts=4, losses={"balance": 1.0})
    with torch.no_grad():
        made.similarity[0] += 0.5
    made(normal(256, 6) + 1).losses["balance"].backward()
    assert made.similarity.grad is not None
    assert float(made.similarity.grad[0].norm()) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": -1}, "rate must be at least 0, got -1"),
        ({"scale": 0}, "scale must be above 0 and finite, got 0"),
        ({"update": "pid"}, 'update must be "sign" or "proportional", got "pid"'),
        ({"groups": 4}, "groups needs groups_kept"),
        ({"groups_kept": 4}, "groups_kept needs groups"),
        ({"groups": 3, "groups_kept": 1}, r"experts must be a multiple of groups \(3\), got 8"),
        ({"groups": 4, "groups_kept": 5}, r"groups_kept must be at most groups \(4\), got 5"),
        ({"k": 5, "groups": 4, "groups_kept": 2}, "k must be at most the 4 experts of 2 kept"),
        ({"group_best": 0}, "group_best must be at least 1, got 0"),
        ({"losses": {"load": 1}}, "sigmoid top-k routing has no load loss"),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        SigmoidTopK(**options)
