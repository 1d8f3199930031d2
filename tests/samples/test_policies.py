"""Policies against plain references, exact counts, and unbiasedness by Monte Carlo."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparing
from sparing.samples import clusters, difficulty, draw, gains, infobatch, quantiles, seta, ucb
from sparing.samples import random as random_samples
from sparing.samples.scores import ScoreTable
from sparing.samples.selection import normalised

floats = st.floats(0, 100, width=32)
many = st.lists(floats | st.sampled_from([0.5, 1.0]), min_size=1, max_size=40)
quick = settings(max_examples=40, deadline=None)


def rng(seed=0):
    return draw.generator(seed, 0)


def scores(n, seed=0):
    return np.random.default_rng(seed).exponential(size=n).astype(np.float32)


# ---- drawing ------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 99), st.data())
def test_thinning_leaves_exactly_as_many_and_touches_nothing_else(codes, seed, data):
    code = np.array(codes, dtype=np.uint8)
    before = code.copy()
    have = int((code == 1).sum())
    keep = data.draw(st.integers(0, have))
    draw.thin_(code, 1, keep, rng(seed))
    assert (code == 1).sum() == keep
    assert ((code == before) | ((before == 1) & (code == 0))).all()


def test_every_subset_and_every_order_is_equally_likely(monkeypatch):
    monkeypatch.setattr(draw, "BLOCK", 2)  # and across blocks and buckets
    monkeypatch.setattr(draw, "BUCKET", 1)
    monkeypatch.setattr(draw, "WHOLE", 0)
    random, trials = rng(1), 3000
    subsets = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    orders = dict.fromkeys(itertools.permutations(range(3)), 0)
    for _ in range(trials):
        code = np.ones(5, dtype=np.uint8)
        draw.thin_(code, 1, 2, random)
        subsets[tuple(np.flatnonzero(code).tolist())] += 1
        orders[tuple(draw.shuffled(np.ones(3, dtype=bool), random).tolist())] += 1
    for found in (subsets, orders):
        expected = trials / len(found)
        chi2 = sum((count - expected) ** 2 / expected for count in found.values())
        assert chi2 < len(found) - 1 + 5 * math.sqrt(2 * (len(found) - 1))


def test_large_shuffles_hold_each_id_as_often_as_asked(monkeypatch):
    monkeypatch.setattr(draw, "WHOLE", 100)
    monkeypatch.setattr(draw, "BUCKET", 64)
    monkeypatch.setattr(draw, "BLOCK", 300)
    times = np.random.default_rng(0).integers(0, 4, 2000).astype(np.uint16)
    found = draw.shuffled(times, rng())
    assert found.dtype == np.int32
    assert (np.bincount(found, minlength=2000) == times).all()
    assert abs(np.corrcoef(np.arange(found.size), found)[0, 1]) < 0.1


# ---- InfoBatch ----------------------------------------------------------------------------------


def reference_infobatch(values, ratio):
    """(must come, low ones, how many of them, their weight), in plain double precision."""
    known = [float(v) for v in values if not math.isnan(v)]
    if not known:
        return set(range(len(values))), set(), 0, 1.0
    mean = sum(known) / len(known)
    low = {i for i, v in enumerate(values) if v < mean}
    kept = max(1, round((1 - ratio) * len(low))) if low else 0
    return set(range(len(values))) - low, low, kept, len(low) / kept if low else 1.0


@quick
@given(st.lists(floats | st.just(math.nan), min_size=1, max_size=40), st.floats(0.05, 0.95))
def test_infobatch_is_the_papers_rule_with_exact_counts(values, ratio):
    values = np.array(values, dtype=np.float32)
    must, low, kept, weight = reference_infobatch(values.tolist(), ratio)
    found = infobatch.plan(1, values, rng(), ratio=ratio)
    ids = found.index.tolist()
    assert len(set(ids)) == len(ids) == len(must) + kept
    assert must <= set(ids)
    weights = found.plan().weight
    weights = torch.ones(len(ids)) if weights is None else weights
    for i, w in zip(ids, weights.tolist(), strict=True):
        assert w == (np.float32(weight) if i in low else 1.0)
    assert sum(weights.tolist()) == pytest.approx(len(values), rel=1e-6)
    even = normalised(found, "epoch")
    assert even.mean_weight() == pytest.approx(1.0, rel=1e-6)


def test_equal_scores_are_not_below_their_mean():
    assert len(infobatch.plan(1, np.full(9, 0.3, np.float32), rng(), ratio=0.5)) == 9


@pytest.mark.parametrize(
    ("delta", "epochs", "first"), [(0.875, 10, 9), (0.875, 8, 7), (0.1, 30, 3), (0.875, 90, 79)]
)
def test_annealing_starts_at_the_ceiling_in_decimal_arithmetic(delta, epochs, first):
    assert infobatch.annealing(delta, epochs) == first


def test_fractional_annealing_leaves_no_stale_weight():
    for epoch in (9, 10):
        found = infobatch.plan(epoch, scores(50), rng(), ratio=0.5, anneal=9)
        assert found.weights is None
        assert sorted(found.index.tolist()) == list(range(50))
    assert infobatch.plan(8, scores(50), rng(), ratio=0.5, anneal=9).weights is not None


# ---- strata, bounds, windows --------------------------------------------------------------------


@quick
@given(many, st.integers(0, 9))
def test_quantiles_have_exact_strata_ties_or_not(values, seed):
    values = np.array(values, dtype=np.float32)
    borders, keep = (0.3, 0.7), (0.25, 0.5, 1.0)
    counts = quantiles.counts_of(values.size, borders, keep)
    found = quantiles.plan(1, values, rng(seed), borders=borders, keep=keep)
    assert len(found) == sum(kept for _, kept in counts)
    taken = found.code if found.code is not None else np.full(values.size, 3)
    for group, (have, kept) in enumerate(counts, start=1):
        assert (taken == group).sum() == kept
        if found.weights is not None and kept:
            assert found.weights[group] == np.float32(have / kept)
    ordered = np.sort(values)
    ends = np.cumsum([0] + [have for have, _ in counts])
    for group in (1, 2, 3):
        inside = values[taken == group]
        if inside.size and counts[group - 1][0]:
            assert inside.min() >= ordered[ends[group - 1]]
            assert inside.max() <= ordered[ends[group] - 1]


@quick
@given(many, st.data())
def test_the_highest_are_exactly_as_many(values, data):
    values = np.array(values, dtype=np.float32)
    keep = data.draw(st.integers(1, values.size))
    mask = ucb.highest(values, keep, rng())
    assert mask.sum() == keep
    assert sorted(values[mask == 1]) == sorted(values)[-keep:]


def test_ucb_keeps_its_choice_until_the_next():
    method = sparing.UCB(ratio=0.4, every=3, delta=1, size=20)
    method.scores.update_(torch.arange(20), torch.rand(20))
    sets = []
    for epoch in range(1, 6):
        method.scores.update_(torch.arange(20), torch.rand(20))
        method.set_epoch(epoch)
        sets.append(frozenset(method.selection.index.tolist()))
    assert len(set(sets[:3])) == 1
    assert len(set(sets[3:])) == 1
    assert sets[0] != sets[3]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(1, 4))
def test_clusters_are_optimal_by_trying_all(values, k):
    values = np.array(values, dtype=np.float32)
    cuts = clusters.borders(values, k)

    def cost(labels):
        groups = [values[labels == g].astype(np.float64) for g in set(labels.tolist())]
        return sum(((g - g.mean()) ** 2).sum() for g in groups)

    ordered = np.unique(values)
    wanted = min(k, ordered.size)
    best = min(
        cost(clusters.labels(values, ordered[list(borders)]))
        for borders in itertools.combinations(range(1, ordered.size), wanted - 1)
    )
    assert cuts.size == wanted - 1
    assert cost(clusters.labels(values, cuts)) == pytest.approx(best, abs=1e-6)


def test_clusters_of_many_values_find_what_was_planted():
    random = np.random.default_rng(3)
    centres = [0.0, 1.0, 3.0, 7.0]
    values = np.concatenate([c + 0.05 * random.random(40_000) for c in centres]).astype(np.float32)
    label = clusters.labels(values, clusters.borders(values, 4))
    assert [(label[i * 40_000 : (i + 1) * 40_000] == i).mean() for i in range(4)] == [1.0] * 4


def test_seta_slides_from_easy_to_hard_and_begins_again():
    values = np.repeat(np.arange(4, dtype=np.float32), 5)
    seen = []
    for epoch in range(1, 6):
        found = seta.plan(epoch, values, rng(), ratio=0.0, groups=4, window=0.5)
        seen.append(sorted({float(values[i]) for i in found.index}))
    assert seen == [[1.0, 2.0], [2.0, 3.0], [0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    whole = seta.plan(7, values, rng(), ratio=0.4, groups=4, window=0.5, anneal=7)
    assert len(whole) == 12


# ---- gains and coresets -------------------------------------------------------------------------


def test_gain_proportional_holds_its_length_and_expectations():
    value = np.array([0.0, 1.0, 1.0, 2.0, 4.0], dtype=np.float32)
    chance = gains.probabilities(value)
    counts = np.zeros(5)
    trials = 2000
    random = rng()
    for _ in range(trials):
        found = gains.proportional(value, random, strength=1, share=1, rescale=False)
        assert len(found) == 5
        counts += np.bincount(found.index, minlength=5)
    np.testing.assert_allclose(counts / trials, 5 * chance / chance.sum(), atol=0.05)


def test_two_phases_are_complements():
    value = np.linspace(0.0, 1.0, 400).astype(np.float32)
    high, low = (
        gains.phase(epoch, value, rng(), strength=1, rescale=False).index.mean() for epoch in (1, 2)
    )
    assert high > 230
    assert low < 170


def test_scores_of_difficulty_are_their_definitions():
    torch.manual_seed(0)
    logits, targets, features = torch.randn(6, 4), torch.randint(4, (6,)), torch.randn(6, 3)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    error = logits.softmax(1) - torch.nn.functional.one_hot(targets, 4)
    torch.testing.assert_close(difficulty.el2n(logits, targets), error.norm(dim=1))
    torch.testing.assert_close(difficulty.el2n_of_losses(logits, losses), error.norm(dim=1))
    assert difficulty.correct_of_losses(logits, losses).bool().equal(logits.argmax(1) == targets)
    layer = torch.nn.Linear(3, 4)
    for i in range(6):
        layer.zero_grad()
        out = layer(features[i : i + 1])
        torch.nn.functional.cross_entropy(out, targets[i : i + 1]).backward()
        norm = math.sqrt(float(layer.weight.grad.square().sum() + layer.bias.grad.square().sum()))
        found = difficulty.grand(out.detach(), targets[i : i + 1], features[i : i + 1])
        assert float(found) == pytest.approx(norm, rel=1e-4)


def test_k_centre_and_herding_choose_each_once():
    features = torch.tensor([[0.0], [0.1], [5.0], [5.1], [10.0]])
    assert sorted(difficulty.k_centre(features, 3).tolist()) in ([0, 2, 4], [0, 3, 4])
    assert sorted(difficulty.k_centre(torch.zeros(4, 1), 4).tolist()) == [0, 1, 2, 3]
    chosen = difficulty.herding(features - features.mean(0), 5)
    assert sorted(chosen.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("by", ["loss", "el2n", "forgetting", "herding", "k-centre", "grand"])
def test_a_coreset_is_fixed_after_its_first_epochs(by):
    torch.manual_seed(0)
    method = sparing.Coreset(
        by=by, ratio=0.5, start=2, size=20, epochs=5, features=torch.randn(20, 3)
    )
    sets = []
    for epoch in range(5):
        method.set_epoch(epoch)
        sets.append(frozenset(method))
        ids = torch.tensor(sorted(sets[-1]))
        logits = torch.randn(len(ids), 3, requires_grad=True)
        losses = torch.nn.functional.cross_entropy(logits, ids % 3, reduction="none")
        if by == "grand":
            method.observe(losses.detach(), ids)
        method.loss(losses, ids, logits)
    assert [len(s) for s in sets] == [20, 20, 10, 10, 10]
    assert len(set(sets[2:])) == 1


def test_forgetting_counts_right_then_wrong():
    table = ScoreTable(3, "forgetting")
    for right in ([1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]):
        table.update_(torch.arange(3), torch.tensor(right, dtype=torch.float32))
    assert table.value.tolist() == [2, 0, 0]
    assert table.column("ever").tolist() == [1, 1, 0]


# ---- unbiasedness -------------------------------------------------------------------------------

N, TRIALS = 60, 1500
VALUES = scores(N, 5)
GRADIENTS = np.random.default_rng(6).normal(size=(N, 3)) + VALUES[:, None]
UNBIASED = {
    "infobatch": lambda random: infobatch.plan(1, VALUES, random, ratio=0.5),
    "infobatch of 0.8": lambda random: infobatch.plan(1, VALUES, random, ratio=0.8),
    "quantiles": lambda random: quantiles.plan(
        1, VALUES, random, borders=(0.2, 0.85), keep=(0.25, 0.5, 1.0)
    ),
    "gain-proportional": lambda random: gains.proportional(
        VALUES, random, strength=0.5, share=0.7, rescale=True
    ),
    "two-phase, odd": lambda random: gains.phase(1, VALUES, random, strength=1, rescale=True),
    "two-phase, even": lambda random: gains.phase(2, VALUES, random, strength=1, rescale=True),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_the_weighted_sum_over_an_epoch_is_unbiased(name):
    random, found = rng(7), np.empty((TRIALS, 3))
    for trial in range(TRIALS):
        plan = UNBIASED[name](random)
        found[trial] = plan.weight_of(plan.index).astype(np.float64) @ GRADIENTS[plan.index]
    error = found.std(0, ddof=1) / math.sqrt(TRIALS)
    assert (np.abs(found.mean(0) - GRADIENTS.sum(0)) <= 3 * error).all()


@pytest.mark.parametrize("name", ["infobatch", "quantiles", "random"])
def test_the_first_step_is_unbiased_with_weights_by_epoch(name):
    random, found = rng(11), np.empty((TRIALS, 3))
    for trial in range(TRIALS):
        if name == "random":
            plan = random_samples.plan(N, random, keep=40)
        else:
            plan = normalised(UNBIASED[name](random), "epoch")
        batch = plan.index[:8]
        weight = plan.weight_of(batch)
        weight = np.ones(8) if weight is None else weight.astype(np.float64)
        found[trial] = weight @ GRADIENTS[batch] / 8
    error = found.std(0, ddof=1) / math.sqrt(TRIALS)
    assert (np.abs(found.mean(0) - GRADIENTS.mean(0)) <= 3 * error).all()


def test_what_is_biased_by_design_is_seen_to_be_so():
    plan = seta.plan(2, VALUES, rng(), ratio=0.0, groups=4, window=0.5)
    assert abs(GRADIENTS[plan.index].mean(0) - GRADIENTS.mean(0)).max() > 0.1
