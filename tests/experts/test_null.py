"""Null experts of top-k and top-p, and the defects of the released code that they must not have.

AdaMoE (github.com/CengZihao/AdaMoE): the load of null experts is averaged over tokens, which
changes nothing, and true experts are those of ids 0 to 7 whatever their number. MoE++
(github.com/SkyworkAI/MoE-plus-plus): hidden states are multiplied in place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routers import map_of, normal
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts import losses
from sparing.experts.controller import ExpertController
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer
from sparing.experts.losses import LossWeights
from sparing.experts.method import RoutedExperts
from sparing.experts.top_k import TopK
from sparing.experts.top_p import TopP

KINDS = ("zero", "copy", "constant")


def layer_of(method: RoutedExperts, dim: int = 8, dtype: torch.dtype = torch.float32) -> Any:
    experts = Experts(dim, 12, method.slots)
    experts.init_(generator=torch.Generator().manual_seed(0))
    layer = ExpertLayer(method.router(dim), experts, name="layer").train()
    null = layer.router.null
    if null is not None and null.vector is not None:
        with torch.no_grad():
            null.vector.copy_(normal(null.count, dim, seed=7))
            null.mix.copy_(normal(2 * null.count, dim, seed=8))
    return layer.to(dtype)


def method_of(kind: str, over: str | None = None, *, base: str = "top-k", **more: Any) -> Any:
    options = {"null_experts": 3, "null_kind": kind, "null_weights": over, "normalize": True}
    if base == "top-k":
        return TopK(**{"experts": 4, "k": 2, **options, **more})
    return TopP(**{"experts": 4, "p": 0.6, **options, **more})


def reference(layer: Any, x: Tensor, method: Any) -> tuple[Tensor, list[int]]:
    """(T, d) and the true experts of each token, from the definition, token by token."""
    options, null = method.options, layer.router.null
    rows = torch.cat([layer.router.similarity, null.similarity])
    y, k = [], []
    for token in x:
        score = (rows @ token).softmax(0)
        order = sorted(range(len(score)), key=lambda e, s=score: (-float(s[e].detach()), e))
        taken, total = [], 0.0
        for expert in order:
            taken.append(expert)
            total += float(score[expert].detach())
            if len(taken) == getattr(options, "k", None):
                break
            if total > getattr(options, "p", 2.0):
                break
        within = [e for e in taken if e < options.experts or options.weights_over == "all"]
        scale = sum((score[e] for e in within), torch.zeros_like(total_of(score)))
        out = torch.zeros_like(token)
        for expert in taken:
            weight = score[expert] / scale if expert in within else score[expert]
            slot = expert - options.experts
            if slot < 0:
                net = {name: w[expert] for name, w in layer.experts.slots().items()}
                hidden = torch.nn.functional.silu(net["gate"] @ token) * (net["up"] @ token)
                out = out + weight * (net["down"] @ hidden)
            elif options.null_kind == "copy":
                out = out + weight * token
            elif options.null_kind == "constant":
                share = (null.mix[2 * slot : 2 * slot + 2] @ token).softmax(0)
                out = out + weight * (share[0] * token + share[1] * null.vector[slot])
        y.append(out)
        k.append(sum(e < options.experts for e in taken))
    return torch.stack(y), k


def total_of(score: Tensor) -> Tensor:
    return score.sum()


@pytest.mark.parametrize("base", ["top-k", "top-p"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("over", ["true", "all", None])
def test_outputs_and_gradients_are_those_of_the_definition(base, kind, over):
    method = method_of(kind, over, base=base, losses={})
    ours, theirs = (layer_of(method, dtype=torch.float64) for _ in range(2))
    x = 2 * normal(40, 8, dtype=torch.float64)
    upstream = normal(40, 8, seed=3, dtype=torch.float64)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = ours(left)
    expected, k = reference(theirs, right, method)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    assert ours.router(x).k.tolist() == k
    assert 0 in k
    assert max(k) > 1
    (y * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=1e-8)
    for (name, one), (_, two) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert one.grad is not None, name
        other = torch.zeros_like(one) if two.grad is None else two.grad
        torch.testing.assert_close(one.grad, other, rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("over", ["true", "all"])
@pytest.mark.parametrize("training", [True, False])
def test_a_token_of_null_experts_alone_gives_numbers(kind, over, training):
    """MoE++ avoids 0/0 only because its top two ids differ; here all chosen may be null."""
    layer = layer_of(method_of(kind, over, k=3)).train(training)
    with torch.no_grad():
        # scores of the true experts underflow to exactly zero
        layer.router.similarity.fill_(-100.0)
        layer.router.null.similarity.fill_(100.0)
    x = normal(20, 8).abs().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert layer.router(x).k.tolist() == [0] * 20
    assert y.isfinite().all()
    for parameter in (x, *layer.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    if kind == "zero":
        assert not y.any()
    elif kind == "copy":
        torch.testing.assert_close(y, x.detach())


def test_what_is_right_for_each_kind_is_the_default():
    assert TopK(null_experts=1).options.weights_over == "true"
    assert TopK(null_experts=1, null_kind="copy").options.weights_over == "all"
    assert TopK(null_experts=1, null_kind="constant").options.weights_over == "all"
    # zero experts do not shrink the output: a token's true experts sum to 1
    routing = layer_of(method_of("zero")).router(normal(60, 8))
    total = map_of(routing, 60, 4).sum(1)
    torch.testing.assert_close(total[routing.k > 0], torch.ones(int((routing.k > 0).sum())))
    # copies take their share of 1: the output is between the token and what the experts make
    layer = layer_of(method_of("copy"))
    x = normal(60, 8)
    routing = layer.router(x)
    share = (routing.bypass * x).sum(1) / x.square().sum(1)
    torch.testing.assert_close(map_of(routing, 60, 4).sum(1) + share, torch.ones(60))


@pytest.mark.parametrize("true", [2, 4, 12])
def test_the_true_experts_are_counted_not_assumed(true):
    """The released AdaMoE takes ids 0 to 7 for the true experts, of however many there are."""
    method = TopK(experts=true, k=2, null_experts=4)
    layer = layer_of(method)
    routing = layer.router(normal(200, 8))
    assert routing.counts.shape == (true,)
    assert 0 < routing.rows < 400
    assert int(routing.experts.max()) == true - 1
    total = map_of(routing, 200, true).sum(1)
    served = routing.k > 0
    torch.testing.assert_close(total[served], torch.ones(int(served.sum())))


def test_the_balance_loss_takes_the_mean_load_over_the_null_experts():
    """In the released AdaMoE the mean runs over tokens, where it changes nothing."""
    score = torch.full((8, 4), 0.25, dtype=torch.float64)
    active = torch.ones(4, dtype=torch.bool)
    one, spread = (torch.zeros(8, 4, dtype=torch.bool) for _ in range(2))
    for token in range(8):
        one[token, [token % 2, 2]] = True  # both nulls' load on one of them
        spread[token, [token % 2, 2 + token // 4]] = True
    score = normal(8, 4, dtype=torch.float64).softmax(1).requires_grad_()
    values = [losses.balance(score, chosen, active, null=2) for chosen in (one, spread)]
    torch.testing.assert_close(values[0], values[1])
    plain = [losses.balance(score, chosen, active) for chosen in (one, spread)]
    assert float((plain[0] - plain[1]).abs().detach()) > 0.01
    # by hand: loads 4, 4 and the mean of 8 and 0
    load = torch.tensor([4.0, 4, 4, 4], dtype=torch.float64) / 16
    torch.testing.assert_close(values[0], 4 * (load * score.mean(0)).sum())
    # so that there is no pressure between null experts
    (grad,) = torch.autograd.grad(values[0], score)
    torch.testing.assert_close(grad[:, 2], grad[:, 3])


def test_the_balance_loss_of_a_skewed_router_has_a_gradient_on_both_sides():
    layer = layer_of(TopK(experts=4, k=2, null_experts=2, losses=LossWeights(balance=1.0)))
    x = normal(256, 8) + 1
    with torch.no_grad():
        layer.router.null.similarity.add_(0.5)  # most tokens take null experts
    first = layer.router(x)
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.5)
    for _ in range(150):
        optimizer.zero_grad()
        layer.router(x).losses["balance"].backward()
        for parameter in layer.router.parameters():
            assert parameter.grad is not None
            assert parameter.grad.norm() > 0
        optimizer.step()
    last = layer.router(x)
    even = 256 * 2 * 4 / 6
    assert first.rows < 0.6 * even
    assert last.rows == pytest.approx(even, rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_is_left_as_it_is(kind):
    """The released MoE++ multiplies hidden states in place."""
    layer = layer_of(method_of(kind))
    x = normal(2, 20, 8)
    kept = x.clone()
    layer(x)
    assert x.equal(kept)
    assert x._version == 0


@pytest.mark.parametrize("base", ["top-k", "top-p"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_gets_nothing_and_changes_no_other(base, kind):
    layer = layer_of(
        method_of(kind, base=base, losses=LossWeights(balance=1, z=1)), dtype=torch.float64
    )
    x = normal(4, 10, 8, dtype=torch.float64)
    layer.begin(normal(4, 10, seed=1) > 0)
    y = layer(x)
    mask = layer.mask
    assert not y[~mask].any()
    padded = layer.take_losses()
    assert int(layer.record.tokens) == int(mask.sum())
    layer.begin(None)
    torch.testing.assert_close(y[mask], layer(x[mask]))
    for name, value in layer.take_losses().items():
        torch.testing.assert_close(value, padded[name])
    empty = layer(x[:0])
    assert empty.shape == (0, 10, 8)
    sum(layer.take_losses().values(), empty.sum()).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_autocast(kind):
    layer = layer_of(method_of(kind, losses={}))
    x = normal(30, 8)
    whole = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), whole, rtol=0.05, atol=0.05)
    routing = layer.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer.router(x)
    assert cast.weights.equal(routing.weights)
    assert cast.weights.dtype == torch.float32
    layer.experts.to(torch.bfloat16)
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    half.float().sum().backward()


def test_true_experts_are_what_is_recorded_and_paid():
    layer = layer_of(method_of("zero"))
    layer(normal(100, 8))
    record = layer.record
    assert int(record.tokens) == 100
    assert record.k_counts.shape == (5,)
    assert int(record.k_counts[0]) > 0
    assert int(record.load.sum()) == int((record.k_counts * torch.arange(5)).sum()) < 300
    rows = int(record.load.sum())
    spent, dense = layer.take_flops()
    assert spent == 3 * layer.experts.flops(rows) + 3 * 2 * 100 * 8 * 7
    assert dense == 3 * layer.experts.flops(400)


def test_inactive_slots_are_never_taken():
    layer = layer_of(method_of("copy", losses=LossWeights(balance=1, z=1)))
    layer.router.active[[0, 3]] = False
    layer(normal(60, 8)).square().sum().backward()
    assert layer.record.load[[0, 3]].tolist() == [0, 0]
    assert not layer.router.similarity.grad[[0, 3]].any()
    assert layer.router.similarity.grad.isfinite().all()


def test_the_controller_of_p_holds_true_experts():
    method = TopP(experts=6, target_k=1.5, null_experts=4, calibration=2)
    layer = layer_of(method, dim=16)
    controller = ExpertController([("layer", layer)])
    found = []
    for step in range(1, 81):
        layer(normal(256, 16, seed=step))
        found.append(float(layer.record.load.sum()) / 256)
        controller.step(step)
    assert found[0] == pytest.approx(1.5, abs=0.02)
    assert sum(found[20:]) / 60 == pytest.approx(1.5, rel=0.04)


def test_a_tokens_output_does_not_depend_on_the_others():
    for kind in KINDS:
        layer = layer_of(method_of(kind), dtype=torch.float64).eval()
        x = normal(30, 8, dtype=torch.float64)
        alone = torch.cat([layer(x[t : t + 1]) for t in range(30)])
        torch.testing.assert_close(layer(x), alone)


def test_without_null_experts_nothing_changes():
    plain, none = TopK(experts=4).router(8, 3), TopK(experts=4, null_experts=0).router(8, 3)
    assert plain.state_dict().keys() == none.state_dict().keys() == {"similarity", "active"}
    # and the true rows of a seed are those without null experts
    assert TopK(experts=4, null_experts=2).router(8, 3).similarity.equal(plain.similarity)


def test_expected_load_and_width():
    assert TopK(experts=6, k=4, null_experts=2).expected_k == 3.0
    assert TopP(experts=4, p=1.0, null_experts=4).expected_k == 4.0
    assert TopP(experts=4, target_k=0.5, null_experts=4).expected_k == 0.5


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (TopK, {"null_experts": -1}, "null_experts must be at least 0, got -1"),
        (TopK, {"null_kind": "void"}, 'null_kind must be one of zero, copy, constant, got "void"'),
        (TopK, {"null_weights": "none"}, "null_weights must be one of true, all"),
        (TopK, {"null_weights": "all", "normalize": False}, "take normalize=True"),
        (TopP, {"null_weights": "all"}, "take normalize=True"),
        (TopK, {"experts": 2, "null_experts": 2, "k": 5}, r"k must be at most experts \(4\)"),
        (TopP, {"experts": 2, "null_experts": 2, "max_k": 5}, r"max_k must be at most experts"),
        (TopP, {"target_k": 0, "null_experts": 1}, "target_k must be above 0"),
    ],
)
def test_bad_options_say_what_is_wrong(make, options, message):
    with pytest.raises(RequestError, match=message):
        make(**options)
