from __future__ import annotations

from typing import Any

import pytest
import torch
from routers import map_of, normal, routes_in_single
from torch import nn

from sparing.core.errors import RequestError
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer
from sparing.experts.losses import LossWeights
from sparing.experts.top_k import TopK, TopKOptions, TopKRouter


def router(dim: int = 8, seed: int = 0, **options: Any) -> TopKRouter:
    return TopKRouter(dim, TopKOptions(**options), seed).train()


@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("normalize", [True, False, None])
@pytest.mark.parametrize("training", [True, False])
def test_each_token_takes_its_best_by_softmax(k, normalize, training):
    made = router(experts=6, k=k, normalize=normalize).train(training)
    x = normal(30, 8)
    routing = made(x)
    found = map_of(routing, 30, 6)
    score = torch.softmax(x @ made.similarity.detach().t(), 1)
    expected = torch.zeros_like(score)
    for token in range(30):
        best = sorted(range(6), key=lambda e, row=score[token]: -float(row[e]))[:k]
        expected[token, best] = score[token, best]
    if normalize or (normalize is None and k > 1):
        expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(found, expected)
    assert routing.k.tolist() == [k] * 30
    assert routing.rows == 30 * k
    assert bool(routing.losses) == training


def test_gradients_are_those_of_autograd():
    made = router(6, experts=5, k=2).double()
    x = normal(20, 6, dtype=torch.float64)
    upstream = normal(20, 5, seed=1, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    routing = made(ours)
    assert routing.weights.dtype == torch.float64
    (routing.weights * upstream[routing.tokens, routing.experts]).sum().backward()
    rows = made.similarity.detach().clone().requires_grad_()
    logits = theirs @ rows.t()
    best = logits.topk(2, dim=1).indices
    # softmax over the chosen logits is the renormalised softmax
    weights = logits.gather(1, best).softmax(1)
    (weights * upstream.gather(1, best)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(made.similarity.grad, rows.grad)


def test_one_expert_per_token_still_teaches_the_router():
    made = router(experts=4, k=1, losses=LossWeights())
    routing = made(normal(30, 8))
    (routing.weights * normal(30, seed=1)).sum().backward()
    assert made.similarity.grad is not None
    assert made.similarity.grad.norm() > 1e-3
    # the weight of a single normalised expert is constant
    constant = router(experts=4, k=1, normalize=True, losses=LossWeights())
    routing = constant(normal(30, 8))
    assert routing.weights.tolist() == pytest.approx([1.0] * 30)
    (routing.weights * normal(30, seed=1)).sum().backward()
    assert constant.similarity.grad is not None
    assert float(constant.similarity.grad.norm()) < 1e-6


def test_padding_gets_no_rows_and_changes_no_other():
    made = router(experts=4, losses=LossWeights(balance=1, z=1))
    x, mask = normal(40, 8), normal(40, seed=1) > 0
    padded, alone = made(x, mask), made(x[mask])
    assert not padded.k[~mask].any()
    assert (padded.k[mask] == 2).all()
    torch.testing.assert_close(map_of(padded, 40, 4)[mask], map_of(alone, len(alone.k), 4))
    for name, value in padded.losses.items():
        torch.testing.assert_close(value, alone.losses[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_real_token_gives_no_rows(tokens, training):
    made = router(experts=4, losses=LossWeights(balance=1, z=1)).train(training)
    x = normal(tokens, 8).requires_grad_()
    routing = made(x, torch.zeros(tokens, dtype=torch.bool))
    assert routing.rows == 0
    assert routing.counts.tolist() == [0] * 4
    total = routing.weights.sum() + sum(routing.losses.values(), torch.zeros(()))
    total.backward()
    assert made.similarity.grad is not None
    assert not made.similarity.grad.any()


def test_inactive_slots_are_never_taken():
    made = router(experts=5, k=3, losses=LossWeights(balance=1, z=1))
    made.active[[0, 4]] = False
    routing = made(normal(30, 8))
    assert routing.counts.tolist() == [0, 30, 30, 30, 0]
    total = (routing.weights * normal(90)).sum() + sum(routing.losses.values())
    total.backward()
    assert made.similarity.grad is not None
    assert torch.isfinite(made.similarity.grad).all()
    assert not made.similarity.grad[[0, 4]].any()
    assert made.similarity.grad[1:4].any(1).all()
    made.active[1:3] = False
    assert made(normal(30, 8)).k.tolist() == [1] * 30


def test_one_expert_takes_everything():
    made = router(experts=1, k=1)
    routing = made(normal(10, 8))
    assert routing.weights.tolist() == [1.0] * 10
    assert routing.counts.tolist() == [10]


def test_a_tokens_routing_does_not_depend_on_the_others():
    made = router(6, experts=5).double().eval()
    x = normal(30, 6, dtype=torch.float64)
    whole = map_of(made(x), 30, 5)
    alone = torch.cat([map_of(made(x[t : t + 1]), 1, 5) for t in range(30)])
    torch.testing.assert_close(whole, alone)


def test_half_precision_is_routed_in_single():
    routes_in_single(router(experts=4))


def test_a_layer_trains_in_half_precision():
    experts = Experts(16, 24, 4)
    experts.init_(generator=torch.Generator().manual_seed(0))
    layer = ExpertLayer(router(16, experts=4), experts).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(normal(2, 30, 16))
    assert y.dtype == torch.bfloat16
    (y.float().square().mean() + layer.take_losses()["balance"]).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_the_balance_loss_evens_the_load():
    made = router(experts=4, k=1, losses=LossWeights(balance=1.0))
    x = normal(256, 8) + 1
    first = made(x).counts
    optimizer = torch.optim.SGD([made.similarity], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        made(x).losses["balance"].backward()
        optimizer.step()
    last = made(x).counts
    assert int(first.max()) > 2 * 64
    assert int(last.max()) < 1.3 * 64


def test_the_global_generator_is_neither_seeded_nor_drawn_from():
    before = torch.random.get_rng_state()
    made = router(experts=4)
    made(normal(20, 8))
    made.eval()(normal(20, 8))
    assert torch.random.get_rng_state().equal(before)
    assert router(seed=1).similarity.equal(router(seed=1).similarity)
    assert not router(seed=1).similarity.equal(router(seed=2).similarity)


def test_slots_and_expected_load():
    method = TopK(experts=6, k=3)
    assert (method.slots, method.expected_k) == (6, 3.0)
    made = method.router(8)
    assert made.slots() == {"similarity": made.similarity}
    assert isinstance(made.similarity, nn.Parameter)
    assert not made.tracks_outputs
    made.update_thresholds(torch.ones(6), torch.tensor(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1.5}, "k must be a whole number, got 1.5"),
        ({"experts": 0}, "experts must be at least 1, got 0"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"experts": 2, "k": 3}, r"k must be at most experts \(2\), got 3"),
        ({"losses": {"target_k": 0.1}}, "no target_k loss; its losses: balance, z"),
        ({"losses": LossWeights(diversity=0.1)}, "no diversity loss"),
        ({"losses": {"blance": 0.1}}, 'losses has no option "blance"; did you mean "balance"'),
        ({"losses": None}, "losses must be a mapping of options, got None"),
        ({"expert": 4}, 'TopK has no option "expert"; did you mean "experts"'),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        TopK(**options)


def test_options_survive_as_plain_data():
    method = TopK(experts=4, k=1, losses={"z": 0.1})
    assert method.options.losses == LossWeights(z=0.1)
    assert method.options.normalize is False
    assert TopK.from_dict(method.to_dict()).options == method.options
