from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts.losses import LossWeights
from sparing.experts.noise import Noise
from sparing.experts.switch import Switch, SwitchOptions, SwitchRouter


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def router(dim: int = 6, seed: int = 0, **options: Any) -> SwitchRouter:
    return SwitchRouter(dim, SwitchOptions(**options), seed).double().train()


@pytest.mark.parametrize("jitter", [0.0, 0.4])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_a_plain_loop(jitter, training):
    every = LossWeights(balance=0.3, z=0.1)
    made = router(experts=5, jitter=jitter, losses=every).train(training)
    x, upstream = normal(15, 6, seed=1), normal(15, 5, seed=2)
    ours = x.clone().requires_grad_()
    routing = made(ours)
    total = (routing.weights * upstream[routing.tokens, routing.experts]).sum()
    (total + sum(routing.losses.values())).backward()

    factor = torch.ones_like(x)
    if training and jitter:
        factor = 1 - jitter + 2 * jitter * Noise(0).uniform(x, 6)
        assert float(factor.min()) >= 0.6
        assert float(factor.max()) < 1.4
    rows, theirs = made.similarity.detach().clone().requires_grad_(), x.clone().requires_grad_()
    weights, probabilities, z = {}, [], 0.0
    for t in range(15):
        logits = rows @ (theirs[t] * factor[t])
        probability = logits.exp() / logits.exp().sum()
        best = int(probability.argmax())
        weights[t, best] = probability[best]
        probabilities.append(probability)
        z = z + logits.exp().sum().log() ** 2 / 15
    share = [sum(1 for _, e in weights if e == expert) / 15 for expert in range(5)]
    mean = sum(probabilities) / 15
    expected = {"balance": 0.3 * 5 * sum(share[e] * mean[e] for e in range(5)), "z": 0.1 * z}
    assert routing.losses.keys() == (expected.keys() if training else set())
    for name, value in routing.losses.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    pairs = list(zip(routing.tokens.tolist(), routing.experts.tolist(), strict=True))
    assert set(pairs) == set(weights)
    for pair, weight in zip(pairs, routing.weights, strict=True):
        torch.testing.assert_close(weight, weights[pair], rtol=1e-9, atol=1e-12)
    loss = sum(weights[p] * upstream[p] for p in weights)
    (loss + (sum(expected.values()) if training else 0)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(made.similarity.grad, rows.grad, rtol=1e-6, atol=1e-9)


def test_weights_are_probabilities_and_evaluation_is_deterministic():
    # the released LLaMA-MoE gate multiplies by the noisy logit, and adds noise in evaluation too
    made = router(experts=4, jitter=0.5)
    with torch.no_grad():
        made.similarity *= 10
    x = normal(200, 6)
    routing = made(x)
    assert float(routing.weights.detach().min()) > 1 / 4
    assert float(routing.weights.detach().max()) <= 1
    first, second = made.eval()(x), made(x)
    assert first.experts.equal(second.experts)
    assert first.weights.equal(second.weights)
    assert int(made.noise.draws) == 1


def test_without_jitter_nothing_is_drawn():
    made = router(experts=4, jitter=0.0)
    made(normal(10, 6))
    assert int(made.noise.draws) == 0


def test_a_skewed_router_gets_a_gradient_from_the_balance_loss():
    made = router(experts=4, jitter=0.0, losses={"balance": 1.0})
    x = normal(256, 6) + 1
    with torch.no_grad():
        made.similarity[0] += 0.5
    made(x).losses["balance"].backward()
    assert made.similarity.grad is not None
    assert float(made.similarity.grad[0].norm()) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jitter": 1.5}, r"jitter must be in \[0, 1\], got 1.5"),
        ({"k": 2}, 'Switch has no option "k"'),
        ({"losses": {"load": 0.1}}, "Switch routing has no load loss; its losses: balance, z"),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        Switch(**options)


def test_one_expert_per_token():
    method = Switch(experts=6)
    assert (method.slots, method.expected_k, method.options.k) == (6, 1.0, 1)
    assert "k" not in method.to_dict()
