"""Top-any routing: fallback, weights, edges, precision and options."""

from __future__ import annotations

import pytest
import torch
from planted import small_layer
from routers import EDGES, EVERY_LOSS, double_layer, map_of, normal, plain_expert, router, same_rows

from sparing.core.errors import RequestError
from sparing.experts.losses import LossWeights
from sparing.experts.top_any import PUBLISHED_LOSSES, TopAny

# ---- fallback and weights ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_token_that_no_gate_opens_for_takes_its_best_active_expert(training):
    made = router(max_experts=4, start_experts=3).train(training)
    with torch.no_grad():
        made.threshold.fill_(1.0)
    x = torch.cat([normal(30, 8), made.similarity[3:].detach()])
    routing = made(x)
    cosine = made.cosine(x).detach()
    assert routing.k.tolist() == [1] * 31
    assert routing.weights.tolist() == [1.0] * 31
    best = cosine[:, :3].argmax(1)
    assert map_of(routing, 31, 4).argmax(1).equal(best)
    assert routing.unserved is not None
    assert routing.unserved.all()
    assert routing.counts[3] == 0


def test_the_published_rule_falls_back_in_evaluation_only():
    made = router(max_experts=4, published=True)
    with torch.no_grad():
        made.threshold.fill_(1.0)
    x = normal(20, 8)
    assert made(x).rows == 0
    assert made.eval()(x).k.tolist() == [1] * 20
    assert made(x).weights.tolist() == [1.0] * 20


@pytest.mark.parametrize("weights", ["score", "softmax", "uniform"])
def test_weights_of_a_token_sum_to_one(weights):
    made = router(max_experts=6, weights=weights)
    x = normal(50, 8)
    routing = made(x)
    found = map_of(routing, 50, 6)
    torch.testing.assert_close(found.sum(1), torch.ones(50))
    if weights == "uniform":
        k = routing.k[routing.tokens].float()
        torch.testing.assert_close(routing.weights, 1 / k)
        return
    logits = made.scale * made.cosine(x).detach()
    strength = torch.sigmoid(logits) if weights == "score" else logits.exp()
    kept = strength * (found > 0)
    torch.testing.assert_close(found, kept / kept.sum(1, keepdim=True))


@pytest.mark.parametrize("weights", ["score", "softmax", "uniform"])
def test_large_scales_keep_gates_weights_and_choice_apart(weights):
    # sigmoid(22) and sigmoid(30) are both 1 in float32
    made = router(4, max_experts=3, scale=40.0, weights=weights).eval()
    with torch.no_grad():
        made.similarity.copy_(torch.eye(4)[:3])
        made.threshold.fill_(0.55)
    x = torch.tensor([[0.8, 0.59, 0.1, 0.0], [0.5, 0.52, 0.51, 0.47]])
    routing = made(x)
    assert routing.k.tolist() == [2, 1]
    assert map_of(routing, 2, 3)[1].argmax() == 1
    if weights == "softmax":
        cosine = made.cosine(x)[0, :2].detach()
        expected = torch.softmax(40 * cosine, 0)
        torch.testing.assert_close(map_of(routing, 2, 3)[0, :2], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [0.5, 64.0, 400.0])
@pytest.mark.parametrize("weights", ["score", "softmax", "uniform"])
def test_any_scale_gives_finite_weights_and_gradients(weights, scale):
    made = router(max_experts=4, start_experts=3, scale=scale, weights=weights)
    with torch.no_grad():
        made.threshold.copy_(torch.tensor([0.9, 0.0, -0.9, 0.0]))
    x = torch.cat([normal(60, 8), 3 * made.similarity.detach()]).requires_grad_()
    mask = torch.arange(64) != 5
    routing = made(x, mask)
    assert torch.isfinite(routing.weights).all()
    (routing.weights * torch.arange(routing.rows)).sum().backward()
    assert x.grad is not None
    assert made.similarity.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(made.similarity.grad).all()


# ---- padding, and inputs at the edge -----------------------------------------------------------


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_padding_gets_no_rows_and_changes_no_other(published, training):
    made = router(max_experts=4, published=published).train(training)
    x = normal(40, 8)
    mask = normal(40, seed=1) > 0
    padded, alone = made(x, mask), made(x[mask])
    assert not padded.k[~mask].any()
    assert padded.k[mask].equal(alone.k)
    assert padded.counts.equal(alone.counts)
    torch.testing.assert_close(map_of(padded, 40, 4)[mask], map_of(alone, len(alone.k), 4))
    assert padded.unserved is not None
    assert alone.unserved is not None
    assert padded.unserved[mask].equal(alone.unserved)
    assert not padded.unserved[~mask].any()
    assert padded.losses.keys() == alone.losses.keys()
    for name, value in padded.losses.items():
        torch.testing.assert_close(value, alone.losses[name])


@pytest.mark.parametrize("options", EDGES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["no tokens", "all padded"])
def test_no_real_token_gives_no_rows(options, training, case):
    layer = small_layer(4, 3, losses=EVERY_LOSS, **options).train(training)
    tokens = 0 if case == "no tokens" else 6
    x = normal(1, tokens, 8).requires_grad_()
    layer.begin(torch.zeros(1, tokens, dtype=torch.bool))
    y = layer(x)
    assert y.shape == x.shape
    assert not y.any()
    found = list(layer.take_losses().values())
    assert all(torch.isfinite(value) for value in found)
    assert bool(found) == training
    (y.sum() + sum(found, torch.zeros(()))).backward()
    for parameter in layer.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    assert int(layer.record.tokens) == 0
    assert not layer.router.threshold.any()
    assert layer.router.calibrated == 0


@pytest.mark.parametrize("options", EDGES)
def test_one_expert_takes_everything_it_must(options):
    layer = small_layer(1, 1, **options).train()
    x = normal(20, 8).requires_grad_()
    y = layer(x)
    layer(x).sum().backward()
    if options.get("published"):
        assert layer.record.k_counts[0] > 0
    else:
        assert layer.record.k_counts.tolist() == [0, 40]
        torch.testing.assert_close(y, plain_expert(layer, x, 0))


def test_tokens_of_zeros_have_finite_gradients():
    for options in EDGES:
        made = router(max_experts=4, losses=LossWeights(z=1.0), **options)
        x = torch.cat([torch.zeros(2, 8), normal(6, 8)]).requires_grad_()
        routing = made(x)
        total = (routing.weights * torch.arange(1.0, routing.rows + 1)).sum()
        (total + routing.losses["z"]).backward()
        assert x.grad is not None
        assert float(x.grad.abs().max()) < 100


def test_length_and_magnitude_of_tokens_do_not_matter():
    made = router(max_experts=4, weights="score")
    x = normal(40, 8)
    plain = made(x)
    for factor in (1e-6, 1e6):
        scaled = made(factor * x)
        assert same_rows(plain, scaled)
        torch.testing.assert_close(plain.weights, scaled.weights)


# ---- evaluation, precision, randomness ---------------------------------------------------------


@pytest.mark.parametrize("options", EDGES)
def test_a_tokens_output_does_not_depend_on_the_others(options):
    layer = double_layer() if not options else small_layer(5, 4, 6, **options).double()
    layer.eval()
    x = normal(30, 6, dtype=torch.float64)
    whole = layer(x)
    alone = torch.cat([layer(x[t : t + 1]) for t in range(30)])
    torch.testing.assert_close(whole, alone, atol=1e-12, rtol=1e-10)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x[order]), whole[order], atol=1e-12, rtol=1e-10)


def test_half_precision_is_routed_in_single():
    made = router(max_experts=4, weights="score")
    x = normal(40, 8).bfloat16()
    half, single = made(x), made(x.float())
    assert same_rows(half, single)
    assert half.weights.dtype == torch.float32
    assert half.weights.equal(single.weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made(x.float())
    assert cast.weights.equal(single.weights)
    assert all(value.equal(cast.losses[name]) for name, value in single.losses.items())


@pytest.mark.parametrize("closed", ["zero", "mean"])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_a_layer_trains_in_half_precision(how, closed):
    layer = small_layer(4, 3, 16, closed_gates=closed, losses=EVERY_LOSS).train()
    x = normal(2, 30, 16)
    if how == "weights":
        layer, x = layer.bfloat16(), x.bfloat16()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    total = y.float().square().mean() + sum(layer.take_losses().values(), torch.zeros(()))
    total.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad[:3].any(), name


@pytest.mark.parametrize("options", [{}, {"published": True}, {"target_k": 1.5}])
def test_the_global_generator_is_neither_seeded_nor_drawn_from(options):
    before = torch.random.get_rng_state()
    made = router(max_experts=4, **({"calibration": None} | options))
    made(normal(20, 8))
    made.eval()(normal(20, 8))
    made.update_thresholds(torch.ones(4), torch.tensor(4))
    assert torch.random.get_rng_state().equal(before)


def test_the_seed_decides_the_rows():
    first, second, third = (router(16, seed, max_experts=4).similarity for seed in (1, 1, 2))
    assert first.equal(second)
    assert not torch.allclose(first, third)
    torch.testing.assert_close(first @ first.t(), torch.eye(4))


def test_more_slots_than_dimensions_are_orthogonal_in_groups():
    rows = router(3, max_experts=5).similarity.detach()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(rows[:3] @ rows[:3].t(), torch.eye(3))


def test_state_keeps_slots_thresholds_and_calibration():
    made = router(16, max_experts=6, calibration=2)
    made(normal(100, 16))
    made.active[1] = False
    again = router(16, 5, max_experts=6, calibration=2)
    again.load_state_dict(made.state_dict())
    for batch in range(3):
        x = normal(100, 16, seed=batch)
        assert made(x).weights.equal(again(x).weights)
    assert made.threshold.equal(again.threshold)
    assert set(made.state_dict()) == {"similarity", "threshold", "active", "calibrated"}


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_experts": 0}, "max_experts must be at least 1, got 0"),
        ({"max_experts": -3}, "max_experts must be at least 1, got -3"),
        ({"max_experts": 4, "start_experts": 5}, r"start_experts must be at most .*\(4\), got 5"),
        ({"start_experts": 0}, "start_experts must be at least 1"),
        ({"start_k": 0.0}, "start_k must be above 0"),
        ({"max_experts": 4, "target_k": 4.5}, r"target_k must be above 0 .*\(4\), got 4.5"),
        ({"target_k": float("nan")}, "target_k must be above 0"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"rate": -0.1}, "rate must be at least 0"),
        ({"calibration": -1}, "calibration must be at least 0"),
        ({"max_experts": 2.5}, "max_experts must be a whole number, got 2.5"),
        ({"adapt": {"every": 1.5}}, "every must be a whole number, got 1.5"),
        ({"adapt": {"decay": 1.5}}, r"decay must be in \[0, 1\], got 1.5"),
        ({"adapt": {"margin": float("nan")}}, "margin must be at least 0, got nan"),
        ({"weights": "sum"}, 'weights must be one of score, softmax, uniform, got "sum"'),
        ({"closed_gates": "open"}, 'closed_gates must be one of zero, mean, none, got "open"'),
        ({"control": "pid", "target_k": 1.0}, 'control must be one of threshold, loss, got "pid"'),
        ({"control": "loss"}, 'control="loss" needs a target_k'),
        ({"losses": {"target_k": 0.1}}, 'needs a target_k and control="loss"'),
        ({"losses": {"balanse": 0.1}}, 'losses has no option "balanse"; did you mean "balance"'),
        ({"losses": 0.1}, "losses must be a mapping of options, got 0.1"),
        ({"adapt": {"evry": 10}}, 'adapt has no option "evry"; did you mean "every"'),
        ({"max_expert": 4}, 'TopAny has no option "max_expert"; did you mean "max_experts"'),
        ({"published": True, "target_k": 1.0}, "published=True has no target_k"),
        ({"published": True, "weights": "score"}, "published=True fixes weights to 'uniform'"),
        ({"published": True, "scale": 2.0}, "published=True fixes scale to 1.0"),
        ({"width": 0}, "width must be at least 1"),
        ({"init": "twin"}, 'init must be "fresh" or "copy", got "twin"'),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        TopAny(**options)


def test_options_of_each_rule():
    published = TopAny(published=True).options
    assert (published.scale, published.weights, published.closed_gates) == (1.0, "uniform", "none")
    assert published.losses == PUBLISHED_LOSSES
    assert published.calibration == 0
    assert TopAny(max_experts=1).options.start_k == 1
    assert TopAny(target_k=2.0).options.control == "threshold"
    assert TopAny(losses={"z": 0.1}).options.losses == LossWeights(z=0.1)
    assert router(16).scale == 4.0
    assert router(16, scale=3.0).scale == 3.0


@pytest.mark.parametrize("options", [{}, {"published": True}, {"max_experts": 1}, {"target_k": 2}])
def test_options_survive_as_plain_data(options):
    method = TopAny(**options)
    assert TopAny.from_dict(method.to_dict()).options == method.options
