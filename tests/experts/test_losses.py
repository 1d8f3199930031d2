"""Auxiliary losses against plain loops, and the gradient that each must have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts import losses
from sparing.experts.losses import LossWeights
from sparing.experts.top_any import TopAnyOptions, TopAnyRouter
from sparing.experts.top_k import TopKOptions, TopKRouter

T, E, D = 7, 5, 4
ACTIVE = torch.tensor([True, True, False, True, True])
MASK = torch.tensor([True, False, True, True, True, False, True])
MASKS = pytest.mark.parametrize("mask", [None, MASK], ids=["all real", "padded"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def real(mask: Tensor | None) -> list[int]:
    return [t for t in range(T) if mask is None or mask[t]]


ALIVE = [e for e in range(E) if ACTIVE[e]]
SCORES = torch.sigmoid(normal(T, E, seed=1))
CHOSEN = (normal(T, E, seed=2) > 0) & ACTIVE


@MASKS
def test_masked_mean_skips_padding(mask):
    values = normal(T, 2)
    expected = sum(values[t] for t in real(mask)) / len(real(mask))
    torch.testing.assert_close(losses.masked_mean(values, mask), expected)
    one = losses.masked_mean(values[:, 0], mask)
    torch.testing.assert_close(one, expected[0])


def test_masked_mean_of_nothing_is_zero():
    assert losses.masked_mean(torch.ones(3, 2), torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0]
    assert losses.masked_mean(torch.ones(0, 2), None).tolist() == [0, 0]


def test_diversity_is_the_mean_squared_cosine_of_different_active_rows():
    rows = normal(E, D)
    squares = [
        float(torch.cosine_similarity(rows[a], rows[b], dim=0)) ** 2
        for a in ALIVE
        for b in ALIVE
        if a != b
    ]
    value = float(losses.diversity(rows, ACTIVE))
    assert value == pytest.approx(sum(squares) / len(squares))
    assert float(losses.diversity(torch.eye(E), ACTIVE)) == pytest.approx(0, abs=1e-12)
    assert float(losses.diversity(torch.ones(E, D), ACTIVE)) == pytest.approx(1)


def test_diversity_of_one_expert_is_zero_with_a_gradient_of_zero():
    rows = normal(E, D).requires_grad_()
    value = losses.diversity(rows, torch.arange(E) == 1)
    value.backward()
    assert value == 0
    assert rows.grad is not None
    assert not rows.grad.any()


def test_simplicity_is_the_mean_norm_of_active_rows():
    rows = normal(E, D)
    expected = sum(math.sqrt(sum(float(v) ** 2 for v in rows[e])) for e in ALIVE) / len(ALIVE)
    assert float(losses.simplicity(rows, ACTIVE)) == pytest.approx(expected)


def test_published_forms_on_the_reference_vector():
    rows = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [0.5, 0.5, 0]])
    active = torch.tensor([True, True, True, False])
    gates = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert losses.published_diversity(rows, active) == 0
    assert float(losses.published_simplicity(rows)) == pytest.approx(1.676777, abs=1e-6)
    assert float(losses.published_balance(gates)) == pytest.approx(2.666667, abs=1e-6)
    assert float(losses.masked_mean(gates, None).mean()) == 0.25


def test_published_diversity_is_a_frobenius_norm():
    rows = normal(E, D)
    unit = rows / rows.norm(dim=1, keepdim=True)
    gram = [[float(unit[a] @ unit[b]) for a in ALIVE] for b in ALIVE]
    total = sum((g - (a == b)) ** 2 for a, row in enumerate(gram) for b, g in enumerate(row))
    assert float(losses.published_diversity(rows, ACTIVE)) == pytest.approx(math.sqrt(total))


@MASKS
def test_published_balance_is_over_served_tokens(mask):
    gates = CHOSEN.double()
    gates[3] = 0
    served = [t for t in real(mask) if gates[t].any()]
    total = 0.0
    for e in range(E):
        share = sum(float(gates[t, e] / gates[t].sum()) for t in served) / len(served)
        load = sum(float(gates[t, e]) for t in served) / len(served)
        total += share * load
    expected = total / E * E**2
    assert float(losses.published_balance(gates, mask)) == pytest.approx(expected)


@MASKS
def test_balance_is_the_switch_form(mask):
    rows = sum(float(CHOSEN[t].sum()) for t in real(mask))
    total = 0.0
    for e in ALIVE:
        fraction = sum(float(CHOSEN[t, e]) for t in real(mask)) / rows
        share = sum(float(SCORES[t, e] / SCORES[t, ACTIVE].sum()) for t in real(mask))
        total += fraction * share / len(real(mask))
    value = losses.balance(SCORES, CHOSEN, ACTIVE, mask)
    assert float(value) == pytest.approx(len(ALIVE) * total)


def test_balance_is_one_when_balanced_and_the_number_of_experts_at_worst():
    even = torch.eye(4).bool()
    active = torch.ones(4, dtype=torch.bool)
    assert float(losses.balance(torch.full((4, 4), 0.3), even, active)) == pytest.approx(1)
    worst = torch.tensor([[1.0, 0, 0, 0]]).expand(4, 4)
    assert float(losses.balance(worst, worst > 0, active)) == pytest.approx(4)


@MASKS
def test_z_is_the_mean_squared_log_of_the_sum_of_exponentials(mask):
    logits = 3 * normal(T, E, seed=3)
    squares = [math.log(sum(math.exp(float(logits[t, e])) for e in ALIVE)) ** 2 for t in real(mask)]
    value = float(losses.z(logits, ACTIVE, mask))
    assert value == pytest.approx(sum(squares) / len(squares))


@MASKS
def test_efficiency_is_the_share_of_active_experts_taken(mask):
    expected = sum(float(CHOSEN[t].sum()) for t in real(mask)) / len(real(mask)) / len(ALIVE)
    value = float(losses.efficiency(CHOSEN.double(), ACTIVE, mask))
    assert value == pytest.approx(expected)


@MASKS
def test_target_k_is_the_squared_distance_of_the_mean(mask):
    mean = sum(float(CHOSEN[t].sum()) for t in real(mask)) / len(real(mask))
    value = float(losses.target_k(CHOSEN.double(), 1.25, mask))
    assert value == pytest.approx((mean - 1.25) ** 2)


BY_TOKEN = {
    "published balance": lambda v, mask: losses.published_balance(v, mask),
    "balance": lambda v, mask: losses.balance(v, v.detach() > 0.5, ACTIVE, mask),
    "z": lambda v, mask: losses.z(v, ACTIVE, mask),
    "efficiency": lambda v, mask: losses.efficiency(v, ACTIVE, mask),
    "target k": lambda v, mask: losses.target_k(v, 0.5, mask),
}


@pytest.mark.parametrize("name", BY_TOKEN)
def test_padding_changes_nothing_and_gets_no_gradient(name):
    loss = BY_TOKEN[name]
    values = SCORES.clone().requires_grad_()
    loss(values, MASK).backward()
    grad = values.grad
    assert grad is not None
    assert grad[MASK].any()
    assert not grad[~MASK].any()
    other = torch.where(MASK[:, None], SCORES, 0.9 * SCORES + 0.05)
    assert loss(other, MASK) == loss(SCORES, MASK)
    torch.testing.assert_close(loss(SCORES, MASK), loss(SCORES[MASK], None))


@pytest.mark.parametrize("name", BY_TOKEN)
@pytest.mark.parametrize("tokens", [0, 3])
def test_no_real_token_gives_a_finite_loss(name, tokens):
    values = SCORES[:tokens].clone().requires_grad_()
    mask = torch.zeros(tokens, dtype=torch.bool)
    value = BY_TOKEN[name](values, mask)
    value.backward()
    assert torch.isfinite(value)
    assert values.grad is not None
    assert not values.grad.any()


@pytest.mark.parametrize("name", ["balance", "z", "efficiency"])
def test_inactive_experts_get_no_gradient(name):
    values = SCORES.clone().requires_grad_()
    BY_TOKEN[name](values, None).backward()
    assert values.grad is not None
    assert values.grad[:, ACTIVE].any()
    assert not values.grad[:, ~ACTIVE].any()
    rows = normal(E, D).requires_grad_()
    (losses.diversity(rows, ACTIVE) + losses.simplicity(rows, ACTIVE)).backward()
    assert rows.grad is not None
    assert rows.grad[ACTIVE].any(1).all()
    assert not rows.grad[~ACTIVE].any()


# ---- gradients in routers ----------------------------------------------------------------------


def skewed(router: Any, tokens: int = 64) -> Tensor:
    """Tokens that mostly prefer the router's first expert."""
    x = normal(tokens, router.dim, seed=9).float()
    row = router.similarity[0].detach()
    return x + 2 * row / row.norm()


def top_any(name: str, **options: Any) -> TopAnyRouter:
    weights = LossWeights(**{name: 1.0})
    chosen = TopAnyOptions(max_experts=4, calibration=0, losses=weights, **options)
    return TopAnyRouter(8, chosen).train()


def top_k(name: str, k: int, normalize: bool | None = None) -> TopKRouter:
    weights = LossWeights(**{name: 1.0})
    options = TopKOptions(experts=4, k=k, normalize=normalize, losses=weights)
    return TopKRouter(8, options).train()


ROUTERS = {
    "top-any": lambda name: top_any(name),
    "top-any none": lambda name: top_any(name, closed_gates="none"),
    "top-1": lambda name: top_k(name, 1),
    "top-1 normalised": lambda name: top_k(name, 1, normalize=True),
    "top-2": lambda name: top_k(name, 2),
}


@pytest.mark.parametrize("name", ["balance", "z"])
@pytest.mark.parametrize("make", ROUTERS)
def test_a_skewed_router_gets_a_gradient_that_lowers_the_loss(make, name):
    router = ROUTERS[make](name)
    x = skewed(router)
    load = router(x).counts
    assert int(load[0]) > 1.4 * float(load.float().mean())
    (value,) = router(x).losses.values()
    value.backward()
    grad = router.similarity.grad
    assert grad is not None
    assert float(grad[0].norm()) > 1e-3
    if name == "balance":
        with torch.no_grad():
            router.similarity -= 0.05 * grad / grad.norm()
            share = router(x).losses["balance"]
        assert share < value


def test_the_published_balance_has_a_gradient_on_a_skewed_router():
    options = TopAnyOptions(max_experts=4, published=True, losses=LossWeights(balance=1.0))
    router = TopAnyRouter(8, options).train()
    routing = router(skewed(router))
    assert list(routing.losses) == ["balance"]
    routing.losses["balance"].backward()
    for parameter in (router.similarity, router.threshold):
        assert parameter.grad is not None
        assert float(parameter.grad[0].norm()) > 1e-3


@pytest.mark.parametrize("name", ["efficiency", "diversity", "simplicity"])
def test_the_other_losses_reach_the_router(name):
    router = top_any(name)
    if name == "diversity":
        with torch.no_grad():
            router.similarity += 0.3
    (value,) = router(skewed(router)).losses.values()
    value.backward()
    assert router.similarity.grad is not None
    assert router.similarity.grad.norm() > 1e-3
    if name == "efficiency":
        assert router.threshold.grad is not None
        assert (router.threshold.grad < 0).all()  # descending raises every threshold


def test_a_loss_without_a_coefficient_is_left_out():
    router = TopAnyRouter(8, TopAnyOptions(published=True, losses=LossWeights(z=0.1)))
    assert list(router.train()(skewed(router)).losses) == ["z"]
    assert top_k("z", 2)(torch.randn(3, 8)).losses.keys() == {"z"}
    router = TopAnyRouter(8, TopAnyOptions(losses=LossWeights()))
    assert router.train()(skewed(router)).losses == {}


def test_coefficients_multiply():
    weights = LossWeights(balance=0.25, z=0.5)
    router = TopKRouter(8, TopKOptions(experts=4, losses=weights)).train()
    once = TopKRouter(8, TopKOptions(experts=4, losses=LossWeights(balance=1, z=1))).train()
    x = skewed(router)
    found, plain = router(x).losses, once(x).losses
    torch.testing.assert_close(found["balance"], 0.25 * plain["balance"])
    torch.testing.assert_close(found["z"], 0.5 * plain["z"])


def test_evaluation_computes_no_loss():
    for make in ROUTERS.values():
        router = make("balance").eval()
        assert router(skewed(router)).losses == {}


@pytest.mark.parametrize("value", [-0.1, float("nan")])
@pytest.mark.parametrize("name", ["balance", "target_k"])
def test_bad_coefficients_are_named(name, value):
    with pytest.raises(RequestError, match=f"coefficient of the {name} loss"):
        LossWeights(**{name: value})
