"""Noisy top-k against plain loops in float64, and the load estimate against redrawn noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts import losses
from sparing.experts.losses import LossWeights
from sparing.experts.noise import Noise
from sparing.experts.noisy_top_k import NoisyTopK, NoisyTopKOptions, NoisyTopKRouter

WITHOUT = LossWeights()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def router(dim: int = 6, seed: int = 0, **options: Any) -> NoisyTopKRouter:
    made = NoisyTopKRouter(dim, NoisyTopKOptions(**options), seed).double().train()
    with torch.no_grad():
        made.spread.copy_(0.5 * normal(*made.spread.shape, seed=9))
    return made


def share_in_top_k(clean: Tensor, noisy: Tensor, spread: Tensor, k: int, redraws: Tensor) -> Tensor:
    """(T, E): how often each expert is in the top k when its own noise alone is redrawn."""
    found = torch.zeros_like(clean)
    tokens, slots = clean.shape
    for token in range(tokens):
        for expert in range(slots):
            others = torch.cat([noisy[token, :expert], noisy[token, expert + 1 :]])
            border = others.sort(descending=True).values[k - 1]
            drawn = clean[token, expert] + spread[token, expert] * redraws
            found[token, expert] = (drawn > border).double().mean()
    return found


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_outputs_and_gradients_are_those_of_a_plain_loop(k, normalize):
    every = LossWeights(importance=0.3, load=0.2 if k < 5 else 0, z=0.1)
    made = router(experts=5, k=k, normalize=normalize, losses=every)
    x, upstream = normal(12, 6, seed=1), normal(12, 5, seed=2)
    ours = x.clone().requires_grad_()
    routing = made(ours)
    total = (routing.weights * upstream[routing.tokens, routing.experts]).sum()
    (total + sum(routing.losses.values())).backward()

    drawn = Noise(0).normal(x, 5)
    rows, spreads = (p.detach().clone().requires_grad_() for p in (made.similarity, made.spread))
    theirs = x.clone().requires_grad_()
    gates: dict[tuple[int, int], Tensor] = {}
    loads = [torch.zeros((), dtype=torch.float64) for _ in range(5)]
    z = torch.zeros((), dtype=torch.float64)
    for t in range(12):
        clean = rows @ theirs[t]
        spread = torch.log1p(torch.exp(spreads @ theirs[t])) + 0.01
        noisy = clean + drawn[t] * spread
        order = noisy.argsort(descending=True).tolist()
        expo = noisy.exp()
        total = sum(expo[e] for e in (order[:k] if normalize else range(5)))
        for e in order[:k]:
            gates[t, e] = expo[e] / total
        for e in range(5):
            border = noisy[order[k]] if e in order[:k] else noisy[order[k - 1]]
            ratio = (clean[e] - border) / spread[e]
            loads[e] = loads[e] + 0.5 * (1 + torch.erf(ratio / math.sqrt(2)))
        z = z + clean.exp().sum().log() ** 2 / 12
    sums = [sum((g for (_, e), g in gates.items() if e == expert), torch.zeros(())) for expert in
            range(5)]  # fmt: skip

    def cv(values: list[Tensor]) -> Tensor:
        mean = sum(values) / 5
        return sum((v - mean) ** 2 for v in values) / 5 / mean**2

    expected = {"importance": 0.3 * cv(sums), "load": 0.2 * cv(loads), "z": 0.1 * z}
    assert routing.losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(routing.losses[name], value, rtol=1e-9, atol=1e-12)
    pairs = list(zip(routing.tokens.tolist(), routing.experts.tolist(), strict=True))
    assert set(pairs) == set(gates)
    for pair, weight in zip(pairs, routing.weights, strict=True):
        torch.testing.assert_close(weight, gates[pair], rtol=1e-9, atol=1e-12)
    (sum(gates[p] * upstream[p] for p in gates) + sum(expected.values())).backward()
    found_and_wanted = [(ours, theirs), (made.similarity, rows), (made.spread, spreads)]
    for found, wanted in ((a.grad, b.grad) for a, b in found_and_wanted):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_evaluation_is_without_noise_and_draws_nothing():
    made = router(experts=5, k=2).eval()
    x = normal(20, 6)
    routing = made(x)
    score = (x @ made.similarity.detach().t()).softmax(1)
    best = score.topk(2, dim=1).indices
    assert torch.zeros(20, 5).bool().scatter(1, best, True).equal(
        torch.zeros(20, 5).bool().index_put(
            (routing.tokens, routing.experts), torch.tensor(True)
        )
    )  # fmt: skip
    assert int(made.noise.draws) == 0
    assert routing.losses == {}


@pytest.mark.parametrize("signal", [0.0, 2.0])
@pytest.mark.parametrize("k", [1, 2])
def test_the_load_estimate_is_the_share_of_redrawn_noises(signal, k):
    clean = signal * normal(40, 5, seed=1)
    spread = 0.2 + normal(40, 5, seed=2).abs()
    noisy = clean + spread * normal(40, 5, seed=3)
    active = torch.ones(5, dtype=torch.bool)
    estimate = losses.chance_of_top_k(clean, noisy, spread, k, active)
    drawn = normal(20_000, seed=4)
    torch.testing.assert_close(
        estimate, share_in_top_k(clean, noisy, spread, k, drawn), rtol=0, atol=0.015
    )


def released_chance(clean: Tensor, noisy: Tensor, spread: Tensor, k: int) -> Tensor:
    """As in LLaMA-MoE's released gate: which threshold applies is decided by the noise term."""
    top = noisy.topk(k + 1, dim=1).values
    enters, stays = top[:, k - 1 : k], top[:, k : k + 1]
    inside = (noisy - clean) > stays
    return torch.special.ndtr((clean - torch.where(inside, stays, enters)) / spread)


def test_the_released_load_estimate_is_wrong_once_logits_carry_signal_and_ours_is_not():
    spread = torch.full((60, 6), 0.7, dtype=torch.float64)
    drawn, active = normal(20_000, seed=4), torch.ones(6, dtype=torch.bool)
    errors = {}
    for signal in (0.0, 2.0):
        clean = signal * normal(60, 6, seed=1)
        noisy = clean + spread * normal(60, 6, seed=3)
        truth = share_in_top_k(clean, noisy, spread, 2, drawn)
        ours = losses.chance_of_top_k(clean, noisy, spread, 2, active)
        errors[signal] = [
            float((found - truth).abs().max())
            for found in (ours, released_chance(clean, noisy, spread, 2))
        ]
    assert errors[0.0][1] < 0.015  # the same for a gate of zeros, at which it starts
    assert errors[2.0][1] > 0.2
    assert max(errors[0.0][0], errors[2.0][0]) < 0.015


def test_the_load_estimate_knows_inactive_slots_and_all_taken():
    clean, spread = normal(10, 4), torch.ones(10, 4, dtype=torch.float64)
    noisy = clean + normal(10, 4, seed=1)
    active = torch.tensor([True, False, True, True])
    found = losses.chance_of_top_k(clean, noisy, spread, 2, active)
    dense = losses.chance_of_top_k(
        clean[:, active], noisy[:, active], spread[:, active], 2, torch.ones(3, dtype=torch.bool)
    )
    torch.testing.assert_close(found[:, active], dense)
    assert not found[:, 1].any()
    certain = losses.chance_of_top_k(clean, noisy, spread, 3, active)
    assert certain.equal(active.double().expand(10, 4))


def test_a_fresh_router_does_not_send_all_tokens_to_the_same_experts_in_evaluation():
    # the released gate starts at zero: all logits tie, and top-k takes fixed indices
    made = NoisyTopKRouter(16, NoisyTopKOptions(experts=8, k=2)).eval()
    counts = made(normal(512, 16, dtype=torch.float32)).counts
    assert int(counts.min()) > 0
    assert int(counts.max()) < 512 / 2


def test_noise_changes_what_is_chosen_and_is_learned():
    made = router(experts=6, k=2)
    x = normal(200, 6)
    first, second = made(x), made(x)
    assert not first.experts.equal(second.experts) or not first.tokens.equal(second.tokens)
    (second.losses["load"] + second.losses["importance"]).backward()
    assert made.spread.grad is not None
    assert made.spread.grad.any(1).all()


@pytest.mark.parametrize("name", ["importance", "load"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_skewed_router_gets_a_gradient_that_lowers_the_loss(name, k):
    made = router(experts=4, k=k, losses={name: 1.0})
    x = normal(256, 6) + 1
    with torch.no_grad():
        made.similarity[0] += 0.4
    before = made(x)
    (value,) = before.losses.values()
    value.backward()
    grad = made.similarity.grad
    assert grad is not None
    assert float(grad[0].norm()) > 1e-3
    with torch.no_grad():
        made.similarity -= 0.05 * grad / grad.norm()
        made.noise.draws.zero_()
        assert float(made(x).losses[name]) < float(value)


def test_losses_of_experts_that_all_get_the_same_are_zero_and_of_one_are_worst():
    active = torch.ones(4, dtype=torch.bool)
    assert float(losses.cv_squared(torch.full((4,), 3.0), active)) == 0
    assert float(losses.cv_squared(torch.tensor([4.0, 0, 0, 0]), active)) == pytest.approx(3)
    some = torch.tensor([True, True, False, False])
    assert float(losses.cv_squared(torch.tensor([4.0, 0, 9, 9]), some)) == pytest.approx(1)
    none = torch.zeros(4, requires_grad=True)
    losses.cv_squared(none, active).backward()
    assert none.grad is not None
    assert not none.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_floor": 0.0}, "noise_floor must be at least 1e-06, got 0.0"),
        ({"noise_floor": "a"}, "noise_floor must be a number"),
        ({"losses": {"balance": 0.1}}, "has no balance loss; its losses: importance, load, z"),
        ({"experts": 2, "k": 3}, r"k must be at most experts \(2\), got 3"),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        NoisyTopK(**options)


def test_slots_and_cost():
    method = NoisyTopK(experts=6, k=3)
    made = method.router(8)
    assert (method.slots, method.expected_k) == (6, 3.0)
    assert made.slots() == {"similarity": made.similarity, "spread": made.spread}
    assert made.flops(10) == 2 * (3 * 2 * 10 * 8 * 6)
