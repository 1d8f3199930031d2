"""Metrics of click prediction, each against a count over all pairs or a hand-made figure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.tasks.clicks.auc import (
    UndefinedError,
    auc,
    auc_by_group,
    auc_difference,
    auc_interval,
    delong,
    placements,
)
from sparing.tasks.clicks.calibration import calibration, log_loss
from sparing.tasks.clicks.streaming import StreamingAUC

# few distinct scores, so that many tie
ROWS = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40)


def both(rows) -> bool:
    return len({label for _, label in rows}) == 2


def tensors(rows) -> tuple[torch.Tensor, torch.Tensor]:
    scores, labels = zip(*rows, strict=True)
    return torch.tensor(scores, dtype=torch.float32) / 7, torch.tensor(labels)


def wins(scores, labels) -> np.ndarray:
    """(P, M): 1, 1/2 or 0 for each pair."""
    high, low = scores[labels].numpy()[:, None], scores[~labels].numpy()[None, :]
    return (high > low) + 0.5 * (high == low)


@settings(max_examples=200, deadline=None)
@given(ROWS.filter(both))
def test_the_auc_is_the_mean_over_all_pairs(rows):
    scores, labels = tensors(rows)
    table = wins(scores, labels)
    assert auc(scores, labels) == pytest.approx(table.mean(), abs=1e-15)
    under, over = placements(scores, labels)
    assert np.allclose(under.numpy(), table.mean(1), rtol=0, atol=1e-15)
    assert np.allclose(over.numpy(), table.mean(0), rtol=0, atol=1e-15)
    assert auc(-scores, labels) == pytest.approx(1 - auc(scores, labels), abs=1e-15)
    assert auc(scores.exp(), labels) == auc(scores, labels)


def test_known_areas():
    labels = torch.tensor([0, 0, 1, 1])
    assert auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), labels) == 0.75
    assert auc(torch.tensor([1.0, 2.0, 3.0, 4.0]), labels) == 1.0
    assert auc(torch.zeros(4), labels) == 0.5
    assert auc(torch.tensor([-math.inf, 0.0, 0.0, math.inf]), labels) == 0.875


def test_placements_have_all_digits():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20_011, generator=generator)
    labels = (torch.rand(20_011, generator=generator) < 0.1).long()
    under, over = placements(scores, labels)
    assert float(under.mean()) == pytest.approx(auc(scores, labels), abs=1e-14)
    assert float(over.mean()) == pytest.approx(auc(scores, labels), abs=1e-14)
    negatives = int((labels == 0).sum())
    whole = under * negatives  # without ties
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-10)


def test_it_counts_exactly_where_float32_would_not():
    # 3 of 10^7 pairs are the wrong way round
    scores = torch.cat([torch.zeros(1), torch.arange(1.0, 10_000_000.0)]).double()
    labels = torch.zeros(len(scores), dtype=torch.bool)
    labels[-4] = True
    assert auc(scores, labels) == (len(scores) - 4) / (len(scores) - 1)


@settings(max_examples=100, deadline=None)
@given(ROWS.filter(both), st.integers(0, 100))
def test_by_group_it_is_the_auc_of_each_groups_rows(rows, seed):
    scores, labels = tensors(rows)
    groups = torch.randint(5, labels.shape, generator=torch.Generator().manual_seed(seed)) * 10
    found = auc_by_group(scores, labels, groups)
    assert found.group.tolist() == sorted(set(groups.tolist()))
    total, weight = 0.0, 0
    for number, value, count, positives in zip(
        found.group, found.auc.tolist(), found.rows.tolist(), found.positives.tolist(), strict=True
    ):
        mine = groups == number
        assert count == int(mine.sum())
        assert positives == int(labels[mine].sum())
        if labels[mine].all() or not labels[mine].any():
            assert math.isnan(value)
        else:
            assert value == pytest.approx(auc(scores[mine], labels[mine]), abs=1e-15)
            total, weight = total + value * count, weight + count
    if weight:
        assert found.mean == pytest.approx(total / weight)
    else:
        assert math.isnan(found.mean)


# ---- intervals -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000))
def test_delong_is_its_formula(seed):
    rng = np.random.default_rng(seed)
    labels = torch.tensor([True, True, False, False, *(rng.random(20) < 0.4)])
    scores = torch.tensor(rng.integers(0, 6, (2, 24)), dtype=torch.float64)
    tables = [wins(each, labels) for each in scores]
    positive, negative = tables[0].shape
    wanted = np.zeros((2, 2))
    for r in range(2):
        for s in range(2):
            tens = [
                (tables[r].mean(1)[i] - tables[r].mean())
                * (tables[s].mean(1)[i] - tables[s].mean())
                for i in range(positive)
            ]
            ones = [
                (tables[r].mean(0)[j] - tables[r].mean())
                * (tables[s].mean(0)[j] - tables[s].mean())
                for j in range(negative)
            ]
            wanted[r, s] = sum(tens) / (positive - 1) / positive
            wanted[r, s] += sum(ones) / (negative - 1) / negative
    values, spread = delong(scores, labels)
    assert np.allclose(values.numpy(), [table.mean() for table in tables], rtol=1e-10, atol=1e-14)
    assert np.allclose(spread.numpy(), wanted, rtol=1e-10, atol=1e-14)
    difference = auc_difference(scores[0], scores[1], labels)
    variance = wanted[0, 0] + wanted[1, 1] - 2 * wanted[0, 1]
    assert difference.error == pytest.approx(math.sqrt(max(variance, 0)), abs=1e-8)
    assert difference.high - difference.estimate == pytest.approx(1.959964 * difference.error, 1e-5)
    whole = auc_interval(scores[0], labels)
    assert 0 <= whole.low <= whole.estimate <= whole.high <= 1
    same = auc_difference(scores[0], scores[0], labels)
    assert (same.low, same.estimate, same.high) == pytest.approx((0, 0, 0), abs=1e-7)


def test_delongs_interval_covers_the_true_area_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = 0.5 * math.erfc(-1.0 / 2)  # of normal scores that are one apart: Phi(1 / sqrt 2)
    covered = 0
    for _ in range(400):
        labels = torch.tensor([True] * 60 + [False] * 150)
        scores = torch.tensor(rng.normal(size=210)) + labels.double()
        found = auc_interval(scores, labels)
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 400 <= 0.975


# ---- streaming -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([10, 12, 18]))
def test_streaming_is_within_its_bound(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(500, generator=generator) * 10 ** float(seed % 5 - 2)
    scores[::7] = scores[0]
    labels = torch.rand(500, generator=generator) < 0.3
    found = StreamingAUC(bits)
    found.add(scores, labels)
    assert abs(found.value() - auc(scores, labels)) <= found.bound() + 1e-12
    assert found.bound() < 0.1


def test_streaming_in_parts_is_streaming_the_whole():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(1000, generator=generator), torch.arange(1000) % 3 == 0
    whole, parts = StreamingAUC(), StreamingAUC()
    whole.add(scores, labels)
    for part in range(4):
        one = StreamingAUC()
        one.add(scores[part::4], labels[part::4])
        parts.merge(one)
    again = StreamingAUC()
    again.load_state_dict(parts.state_dict())
    assert whole.value() == parts.value() == again.value()
    assert whole.bound() == again.bound() < 2e-4


def test_bins_keep_the_order_of_scores_and_zeros_are_one():
    labels = torch.tensor([False, True])
    for low, high in [(-2.0, -1.0), (-1.0, 1.0), (-math.inf, -3e38), (-1e-30, 1e-30), (1.0, 2.0)]:
        found = StreamingAUC()
        found.add(torch.tensor([low, high]), labels)
        assert (found.value(), found.bound()) == (1.0, 0.0)
    found = StreamingAUC()
    found.add(torch.tensor([0.0, -0.0]), labels)
    assert (found.value(), found.bound()) == (0.5, 0.5)


# ---- probabilities -------------------------------------------------------------------------------


def test_log_loss_by_hand_and_far_out():
    log_odds, labels = torch.tensor([0.0, math.log(3.0)]), torch.tensor([1, 0])
    assert log_loss(log_odds, labels) == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert log_loss(torch.tensor([1000.0, -1000.0]), torch.tensor([1, 1])) == pytest.approx(500.0)


def test_calibration_by_hand():
    chance = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.8, 0.8, 0.8, 0.8], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    found = calibration(chance.logit(), labels, bins=2)
    assert found.rows.tolist() == [4, 4]
    assert found.predicted.tolist() == pytest.approx([0.1, 0.8])
    assert found.observed.tolist() == pytest.approx([0.25, 0.75])
    assert found.ratio == pytest.approx(3.6 / 4)
    assert found.error == pytest.approx((0.15 + 0.05) / 2)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.integers(1, 12), st.integers(0, 50))
def test_calibration_does_not_depend_on_the_order_of_rows(rows, bins, seed):
    scores, labels = tensors(rows)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    one, two = calibration(scores, labels, bins), calibration(scores[order], labels[order], bins)
    assert one.rows.tolist() == two.rows.tolist()
    assert int(one.rows.sum()) == len(rows)
    assert torch.allclose(one.predicted, two.predicted)
    assert torch.allclose(one.observed, two.observed)
    assert (one.predicted.diff() >= -1e-12).all()
    assert 0 <= one.error <= 1
    # a constant at the observed rate is calibrated
    rate = labels.double().mean().clamp(1e-3, 1 - 1e-3)
    flat = calibration(rate.logit().expand(len(rows)), labels, bins)
    assert len(flat.rows) == 1


# ---- what has no metric --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda s: auc(s, torch.ones(4)), "AUC of 4 positive and 0 negative rows is undefined"),
        (lambda s: auc(s[:0], torch.ones(0)), "AUC of 0 positive and 0 negative rows"),
        (lambda s: placements(s, torch.zeros(4)), "AUC of 0 positive and 4 negative"),
        (lambda s: auc_interval(s, torch.tensor([1, 0, 0, 0])), "two positive and two negative"),
        (lambda s: StreamingAUC().value(), "AUC of 0 positive and 0 negative rows is undefined"),
    ],
)
def test_an_undefined_auc_says_so(use, message):
    with pytest.raises(UndefinedError, match=message):
        use(torch.arange(4.0))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda s: auc(s, torch.tensor([0, 1, 2, 1])), "labels must be 0 or 1, row 2 has 2"),
        (lambda s: auc(s, torch.ones(3)), r"must be \(N,\), got \(4,\) and \(3,\)"),
        (lambda s: auc(s.log() * math.nan, torch.ones(4)), "score of row 0 is NaN"),
        (lambda s: auc_by_group(s, torch.ones(4), torch.ones(4)), "groups must be whole numbers"),
        (lambda s: delong(s, torch.ones(4)), r"scores must be \(scorings, N\)"),
        (lambda s: auc_interval(s, torch.tensor([1, 0, 1, 0]), 2), r"level must be in \[0, 1\]"),
        (lambda s: log_loss(s[:0], s[:0]), "no rows to take the log loss of"),
        (lambda s: calibration(s[:0], s[:0]), "no rows to compare"),
        (lambda s: calibration(s, torch.ones(4), 0), "bins must be at least 1"),
        (lambda s: StreamingAUC(9), "bits must be at least 10"),
        (lambda s: StreamingAUC(25), "bits must be at most 24"),
        (lambda s: StreamingAUC(12).merge(StreamingAUC(13)), "13 and 12 bits cannot be added"),
        (
            lambda s: StreamingAUC(12).load_state_dict(StreamingAUC(13).state_dict()),
            "are not of 12 bits",
        ),
    ],
)
def test_what_does_not_fit_is_refused(use, message):
    with pytest.raises(RequestError, match=message):
        use(torch.arange(4.0))
