"""Defects of the gates released with LLaMA-MoE, each with the test that keeps it out of here.

| in the released code | test |
|---|---|
| the load estimate compares the noise with the threshold | test_noisy_top_k: released estimate |
| zero rows: in evaluation all tokens take the same experts | test_noisy_top_k: fresh router |
| Switch multiplies by the noisy logit, and is noisy in evaluation | test_switch: probabilities |
| random gate: scores of another shape than the choice | test_1 here |
| random gate: noise is computed, then discarded | test_2 here |
| an expert without tokens gets no gradient: ranks wait forever | test_3 here |
| no token at all is an error | test_router_rules: no real token |
| the balance loss is the constant E/k | test_4 here |
| dropped tokens are counted for the last expert alone | test_5 here: none is dropped |
| the balance loss is compared with 0 on the host in each pass | test_6 here |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer
from sparing.experts.method import RoutedExperts
from sparing.experts.noisy_top_k import NoisyTopK
from sparing.experts.random import RandomExperts
from sparing.experts.sigmoid import SigmoidTopK
from sparing.experts.switch import Switch
from sparing.experts.top_k import TopK


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_1_a_random_router_feeds_its_layer():
    experts = Experts(8, 16, 4)
    experts.init_(generator=torch.Generator().manual_seed(0))
    layer = ExpertLayer(RandomExperts(experts=4, k=2).router(8), experts).train()
    x = normal(2, 10, 8)
    y = layer(x)
    assert y.shape == x.shape
    routing = layer.router.eval()(x.view(20, 8))
    assert routing.weights.shape == routing.experts.shape == (40,)


@pytest.mark.parametrize("method", [RandomExperts(experts=6, k=2), NoisyTopK(experts=6, k=2)])
def test_2_noise_takes_part_in_the_choice(method: RoutedExperts):
    made = method.router(8).train()
    x = normal(64, 8)
    first, second = made(x), made(x)
    maps = [torch.zeros(64, 6).index_put((r.tokens, r.experts), torch.ones(())) for r in
            (first, second)]  # fmt: skip
    assert int((maps[0] != maps[1]).any(1).sum()) > 10


@pytest.mark.parametrize("method", [TopK(experts=6, k=1), Switch(experts=6), SigmoidTopK(k=1)])
def test_3_every_expert_gets_a_gradient_with_or_without_tokens(method: RoutedExperts):
    experts = Experts(8, 16, method.slots)
    experts.init_(generator=torch.Generator().manual_seed(0))
    layer = ExpertLayer(method.router(8), experts).train()
    layer(normal(1, 1, 8)).sum().backward()
    assert int((layer.record.load > 0).sum()) == 1
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape


def released_balance(logits: Tensor, k: int) -> Tensor:
    """As in LLaMA-MoE v2: softmax over the chosen logits alone, then a mean over the chosen."""
    experts = logits.shape[1]
    top, picked = logits.topk(k, dim=1)
    load = torch.nn.functional.one_hot(picked, experts).float().mean(1)  # (T, E), rows sum to 1
    probability = top.softmax(1).mean(1, keepdim=True)  # (T, 1), always 1/k
    return (load * probability).mean() * experts**2


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_4_the_released_balance_loss_is_constant_and_ours_is_not(shift):
    x = normal(256, 8)
    skew = torch.zeros(8)
    skew[0] = shift
    rows = normal(8, 8, seed=1).requires_grad_()
    value = released_balance(x @ rows.t() + skew, 2)
    value.backward()
    assert float(value.detach()) == pytest.approx(8 / 2, rel=1e-5)
    assert rows.grad is not None
    assert float(rows.grad.norm()) < 1e-5


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        (TopK(experts=8, k=2, losses={"balance": 1}), "balance"),
        (TopK(experts=8, k=2, groups=4, groups_kept=2, losses={"balance": 1}), "balance"),
        (Switch(experts=8, jitter=0, losses={"balance": 1}), "balance"),
        (SigmoidTopK(experts=8, k=2, losses={"balance": 1}), "balance"),
        (NoisyTopK(experts=8, k=2, losses={"importance": 1}), "importance"),
        (NoisyTopK(experts=8, k=2, losses={"load": 1}), "load"),
    ],
)
def test_4_every_balance_loss_of_ours_tells_skewed_from_even_and_pulls_back(
    method: RoutedExperts, loss: str
):
    made = method.router(8).train()
    x = normal(512, 8)
    even = float(made(x).losses[loss].detach())
    with torch.no_grad():
        made.similarity[0] += 1.5 * x.mean(0) / x.mean(0).norm()
        x = x + x.mean(0) / x.mean(0).norm()
    routing = made(x)
    assert float(routing.counts[0]) > 1.5 * float(routing.counts.float().mean())
    value = routing.losses[loss]
    assert float(value.detach()) > even + 0.05
    value.backward()
    grad = made.similarity.grad
    assert grad is not None
    assert float(grad[0].norm()) > 1e-2
    # descending takes score away from the expert that has too much
    assert float((x @ grad.t()).mean(0)[0]) > 0


@pytest.mark.parametrize("method", [TopK(experts=6, k=2), Switch(experts=6), NoisyTopK(experts=6)])
def test_5_no_token_is_dropped_however_skewed_the_choice(method: RoutedExperts):
    experts = Experts(8, 16, method.slots)
    experts.init_(generator=torch.Generator().manual_seed(0))
    layer = ExpertLayer(method.router(8), experts).train()
    x = normal(1, 500, 8).abs()
    with torch.no_grad():
        layer.router.similarity[0] = 100.0
    layer(x)
    load = layer.record.load
    k = layer.router.k
    assert int(load[0]) == 500
    assert int(load.sum()) == 500 * k


class Looks(TorchDispatchMode):
    """Counts how often a number is brought from the device to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("cls", "losses"),
    [
        (TopK, {"balance": 0.01, "z": 0.01}),
        (Switch, {"balance": 0.01}),
        (NoisyTopK, {"importance": 0.01, "load": 0.01}),
    ],
)
def test_6_losses_are_not_looked_at_on_the_host(cls: Any, losses: dict[str, float]):
    looks = {}
    for name, own in (("with", losses), ("without", dict.fromkeys(losses, 0.0))):
        made = cls(experts=6, losses=own).router(8).train()
        x = normal(64, 8)
        made(x)  # what is drawn or checked once
        with Looks() as seen:
            found = made(x).losses
        looks[name] = seen.count
        assert bool(found) is (name == "with")
    assert looks["with"] == looks["without"]
    with Looks() as seen:
        bool(normal(1)[0] > 0)
    assert seen.count == 1
