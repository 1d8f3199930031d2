"""Smoothed target rates against counts made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.tasks.clicks.auc import auc
from sparing.tasks.clicks.encoded import Encoded
from sparing.tasks.clicks.rates import additive, chosen, log_odds, paired, smoothed
from sparing.tasks.clicks.reference import fitted, measure


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_smoothing_by_hand():
    found = smoothed(np.array([0.0, 3.0]), np.array([0.0, 5.0]), 0.2, 10.0)
    assert found.tolist() == pytest.approx([0.2, 5 / 15])
    assert log_odds(0.2) == pytest.approx(logit(0.2))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.5, 20.0]))
def test_rates_are_counts(seed, strength):
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(0, 4, (30, 3)), (rng.random(30) < 0.4).astype(np.uint8)
    labels[:2] = 0, 1
    model = additive(ids, labels, (4, 5, 4), (0, 1), strength)
    pairs = paired(ids, labels, (4, 5, 4), model, (0, 1), 3.0)
    base = labels.mean()
    asked = np.array([[0, 1, 0], [3, 4, 3], [2, 2, 0]])  # field 1 never has the value 4
    for row, value, of_pair in zip(
        asked, model.log_odds(asked), pairs.log_odds(asked), strict=True
    ):
        wanted = logit(base)
        for field in (0, 1):
            mine = ids[:, field] == row[field]
            if mine.any():
                rate = (labels[mine].sum() + strength * base) / (mine.sum() + strength)
                wanted += logit(rate) - logit(base)
        assert value == pytest.approx(wanted)
        both = (ids[:, :2] == row[:2]).all(1)
        prior = 1 / (1 + math.exp(-wanted))
        rate = (labels[both].sum() + 3 * prior) / (both.sum() + 3)
        assert of_pair == pytest.approx(logit(rate))


def log(seed: int, rows: int) -> Encoded:
    """Field 0 decides, field 1 decides less, field 2 is a copy of field 0, field 3 is noise."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 6, (rows, 4)).astype(np.int32)
    ids[:, 2] = ids[:, 0]
    chance = 1 / (1 + np.exp(-(0.8 * ids[:, 0] - 0.3 * ids[:, 1] - 2)))
    labels = (rng.random(rows) < chance).astype(np.uint8)
    none = np.zeros((rows, 0), np.float32)
    return Encoded(ids, none, labels, np.zeros(rows, np.int64), np.array([0, rows]))


def test_fields_that_say_the_same_twice_are_not_taken_twice():
    train, held = log(0, 4000), log(1, 4000)
    fields = chosen(train.ids, train.labels, held.ids, held.labels, (6,) * 4)
    assert fields[0] in (0, 2)
    assert 1 in fields
    assert not {0, 2} <= set(fields)


def test_references_come_near_what_can_be_known():
    train, held = log(0, 4000), log(1, 4000)
    found = measure(train, held, (6,) * 4, "all rows")
    assert set(found) == {"smoothed rates", "rates of pairs"}
    # by the log-odds that made the labels
    truth = torch.from_numpy(0.8 * held.ids[:, 0] - 0.3 * held.ids[:, 1])
    best = 100 * auc(truth, torch.from_numpy(held.labels))
    for row in found.values():
        assert row["all rows"] == row["mean"]
        assert abs(row["mean"] - best) < 2
    assert fitted(train.rows(train.labels == 1), (6,) * 4) == {}
    assert set(fitted(train.rows(slice(0, 12)), (6,) * 4)) <= set(found)


@pytest.mark.parametrize(
    ("labels", "strength", "message"),
    [
        (np.ones(4), 20.0, "rows of both classes and a strength above 0, got 4 positives of 4"),
        (np.array([0, 1, 0, 1]), 0.0, "strength 0"),
        (np.array([0, 1, 0, 1]), -1.0, "strength must be at least 0"),
    ],
)
def test_what_has_no_rates_is_refused(labels, strength, message):
    with pytest.raises(RequestError, match=message):
        additive(np.zeros((4, 1), np.int64), labels, (1,), (0,), strength)
