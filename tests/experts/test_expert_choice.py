"""Expert choice in training against a plain loop; evaluation by thresholds learnt in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts.expert_choice import ExpertChoice, ExpertChoiceOptions, ExpertChoiceRouter


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def router(dim: int = 6, seed: int = 0, **options: Any) -> ExpertChoiceRouter:
    return ExpertChoiceRouter(dim, ExpertChoiceOptions(**options), seed).double().train()


def learn(made: ExpertChoiceRouter, steps: int = 30, tokens: int = 400) -> None:
    for step in range(steps):
        routing = made(normal(tokens, made.dim, seed=100 + step))
        made.update_thresholds(routing.counts, torch.tensor(tokens))


@pytest.mark.parametrize("k", [0.5, 1, 2.2, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_and_gradients_are_those_of_a_plain_loop(k, padded):
    made = router(experts=5, k=k, losses={"z": 0.1})
    x, upstream = normal(21, 6, seed=1), normal(21, 5, seed=2)
    mask = normal(21, seed=3) > 0 if padded else None
    real = [t for t in range(21) if mask is None or mask[t]]
    ours = x.clone().requires_grad_()
    routing = made(ours, mask)
    total = (routing.weights * upstream[routing.tokens, routing.experts]).sum()
    (total + sum(routing.losses.values())).backward()

    rows, theirs = made.similarity.detach().clone().requires_grad_(), x.clone().requires_grad_()
    score = torch.stack([(rows @ theirs[t]).softmax(0) for t in range(21)])
    each = max(1, int(len(real) * k / 5 + 0.5))
    values = score.detach()
    pairs = {
        (t, e) for e in range(5) for t in sorted(real, key=lambda t, e=e: -values[t, e])[:each]
    }
    found = list(zip(routing.tokens.tolist(), routing.experts.tolist(), strict=True))
    assert set(found) == pairs
    assert routing.counts.tolist() == [each] * 5
    for pair, weight in zip(found, routing.weights, strict=True):
        torch.testing.assert_close(weight, score[pair], rtol=1e-9, atol=1e-12)
    z = 0.1 * sum((rows @ theirs[t]).logsumexp(0) ** 2 for t in real) / len(real)
    torch.testing.assert_close(routing.losses["z"], z)
    (sum(score[p] * upstream[p] for p in pairs) + z).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(made.similarity.grad, rows.grad, rtol=1e-6, atol=1e-9)
    assert routing.unserved is not None
    taken = {t for t, _ in pairs}
    assert routing.unserved.tolist() == [t in real and t not in taken for t in range(21)]


def test_training_is_not_causal_and_says_so():
    made, x = router(experts=4, k=1), normal(30, 6)
    whole, first = made(x), made(x[:15])
    alone = set(zip(first.tokens.tolist(), first.experts.tolist(), strict=True))
    among = {
        (t, e) for t, e in zip(whole.tokens.tolist(), whole.experts.tolist(), strict=True) if t < 15
    }
    assert alone != among  # later tokens decide about earlier ones
    assert not ExpertChoice.causal
    assert not ExpertChoiceRouter.causal
    assert "training is not causal" in ExpertChoice().touches()[-1]


def test_thresholds_are_the_mean_of_the_cut_offs():
    made = router(experts=4, k=2)
    cut_offs = []
    for step in range(3):
        x = normal(50, 6, seed=step)
        routing = made(x)
        score = (x @ made.similarity.detach().t()).softmax(1)
        lowest = [score[routing.tokens[routing.experts == e], e].min() for e in range(4)]
        cut_offs.append(torch.stack(lowest))
        made.update_thresholds(routing.counts, torch.tensor(50))
        torch.testing.assert_close(made.threshold, torch.stack(cut_offs).mean(0))
    assert int(made.updates) == 3


def test_micro_batches_of_a_step_are_averaged():
    made, apart = router(experts=4, k=2), []
    for seed in range(2):
        one = router(experts=4, k=2)
        one.update_thresholds(one(normal(50, 6, seed=seed)).counts, torch.tensor(50))
        apart.append(one.threshold)
        made(normal(50, 6, seed=seed))
    made.update_thresholds(torch.zeros(4), torch.tensor(100))
    torch.testing.assert_close(made.threshold, (apart[0] + apart[1]) / 2)
    assert int(made.updates) == 1


def test_a_step_without_a_training_pass_changes_nothing():
    made = router(experts=4)
    learn(made, 2)
    before = made.threshold.clone()
    made.update_thresholds(torch.zeros(4), torch.tensor(0))
    made.eval()(normal(20, 6))
    made.update_thresholds(torch.zeros(4), torch.tensor(0))
    assert made.threshold.equal(before)
    assert int(made.updates) == 2


@pytest.mark.parametrize("k", [1, 2.5])
def test_evaluation_takes_about_as_many_experts_as_training(k):
    made = router(experts=8, k=k)
    learn(made)
    routing = made.eval()(normal(2000, 6, seed=7))
    assert float(routing.k.float().mean()) == pytest.approx(k, rel=0.1)
    assert len(routing.k.unique()) > 2  # tokens differ
    assert routing.unserved is not None
    assert routing.unserved.equal(routing.k == 0)
    score = (normal(2000, 6, seed=7) @ made.similarity.detach().t()).softmax(1)
    passed = score >= made.threshold
    assert routing.counts.equal(passed.sum(0))


def test_before_the_first_step_and_on_request_evaluation_is_top_k():
    x = normal(30, 6)
    for made, taken in (
        (router(experts=6, k=2.4), 2),
        (router(experts=6, k=2.6, fallback="top-k"), 3),
        (router(experts=6, k=0.3), 1),
    ):
        if made.options.fallback == "top-k":
            learn(made, 2)
        assert made.eval()(x).k.tolist() == [taken] * 30


def test_every_expert_takes_a_token_of_the_smallest_batch():
    routing = router(experts=4, k=1)(normal(1, 6))
    assert routing.counts.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be above 0 and at most experts \(8\), got 0"),
        ({"k": 9}, r"k must be above 0 and at most experts \(8\), got 9"),
        ({"k": "2"}, "k must be a number, got '2'"),
        ({"fallback": "none"}, 'fallback must be "threshold" or "top-k", got "none"'),
        ({"losses": {"balance": 0.1}}, "expert choice has no balance loss; its losses: z"),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        ExpertChoice(**options)
