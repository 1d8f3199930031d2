"""The rules by which weights move, by hand-computed vectors and by what they must never do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.samples.mixing_weights import (
    bounds,
    differences,
    normalised,
    raised,
    sheared,
    smoothed,
    tempered,
)

LOADS = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25] * 4, [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
ETA, FLOOR = 10.0, 0.05


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=atol,
    )


def test_gate_load_update_by_the_reference_vector():
    apart = differences(LOADS)
    close(apart, [0.314550, 0.194721, 0.268901])
    close(raised(START, apart, ETA, FLOOR), [0.678953, 0.136557, 0.184490])


def test_the_published_rule_runs_away_at_constant_loads_and_the_anchored_one_does_not():
    apart = differences(LOADS)
    published = anchored = torch.full((3,), 1 / 3, dtype=torch.float64)
    for _ in range(20):
        published = raised(published, apart, ETA, FLOOR)
        anchored = raised(torch.full((3,), 1 / 3, dtype=torch.float64), apart, ETA, FLOOR)
    close(published, [0.932, 0.024, 0.044], atol=5e-4)
    once = raised(torch.full((3,), 1 / 3, dtype=torch.float64), apart, ETA, FLOOR)
    assert anchored.equal(once)
    assert float(anchored.max()) < 0.55


def test_loads_are_compared_as_shares_not_as_counts():
    long = LOADS * torch.tensor([[1000.0], [3.0], [1.0]])
    close(differences(long), differences(LOADS).tolist(), atol=1e-12)


def test_distances_and_criteria_against_plain_loops():
    generator = torch.Generator().manual_seed(1)
    loads = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    shares = (loads / loads.sum(1, keepdim=True)).numpy()
    for distance in ("l2", "cosine"):
        plain = np.zeros((5, 5))
        for i in range(5):
            for j in range(5):
                a, b = shares[i], shares[j]
                cosine = 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
                plain[i, j] = np.linalg.norm(a - b) if distance == "l2" else cosine
        others = [np.delete(plain[i], i) for i in range(5)]
        close(differences(loads, distance=distance), plain.mean(1).tolist(), 1e-12)
        for criterion, function in (("min", np.min), ("max", np.max)):
            expected = [float(function(row)) for row in others]
            close(differences(loads, distance=distance, criterion=criterion), expected, 1e-12)


def test_a_single_source_differs_from_nothing():
    for criterion in ("mean", "min", "max"):
        close(differences(LOADS[:1], criterion=criterion), [0.0])


def test_sheared_as_in_the_paper_raises_only_what_is_above_its_reference():
    losses = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
    reference = torch.tensor([1.5, 1.5, 3.0], dtype=torch.float64)
    plain = START * torch.tensor([math.exp(0.5), 1.0, 1.0], dtype=torch.float64)
    close(sheared(START, losses, reference), (plain / plain.sum()).tolist(), 1e-12)
    # the released code lets what is below fall, and has a floor
    free = START * torch.exp(losses - reference)
    free = free / free.sum()
    expected = (1 - 1e-4) * free + 1e-4 / 3
    close(raised(START, losses - reference, 1.0, 1e-4), expected.tolist(), 1e-12)
    # by the general rule, with the excess clamped, it is the same
    excess = (losses - reference).clamp(min=0)
    close(raised(START, excess, 1.0, 0.0), sheared(START, losses, reference).tolist(), 1e-12)


def test_temperature_is_by_size_at_1_and_nearly_even_when_hot():
    close(tempered([100, 900], 1), [0.1, 0.9], 1e-12)
    close(tempered([100, 900], 2), [0.25, 0.75], 1e-12)
    close(tempered([100, 900], 1e6), [0.5, 0.5], 1e-5)
    assert tempered([0, 5], 3).tolist() == [0.0, 1.0]
    assert bool(torch.isfinite(tempered([1, 1e300], 0.1)).all())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 5), min_size=2, max_size=6),
    st.lists(st.floats(0.01, 10), min_size=2, max_size=6),
)
def test_weights_are_a_distribution_with_a_floor_and_follow_the_signal(signal, start):
    size = min(len(signal), len(start))
    first = normalised(start[:size])
    found = raised(first, torch.tensor(signal[:size], dtype=torch.float64), 3.0, 0.1)
    assert float(found.sum()) == pytest.approx(1.0)
    assert float(found.min()) >= 0.1 / size - 1e-12
    free = raised(first, torch.tensor(signal[:size], dtype=torch.float64), 3.0, 0.0)
    moved = (free / first).log() - 3.0 * torch.tensor(signal[:size], dtype=torch.float64)
    close(moved, [float(moved[0])] * size, atol=1e-9)
    close(found, smoothed(free, 0.1).tolist(), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=3, max_size=3))
def test_anchored_weights_stay_in_their_bounds_whatever_the_loads(rows):
    loads = torch.tensor(rows, dtype=torch.float64) + 1e-3
    low, high = bounds(START, ETA, FLOOR)
    found = raised(START, differences(loads), ETA, FLOOR)
    assert bool((found >= low - 1e-12).all())
    assert bool((found <= high + 1e-12).all())


def test_a_source_of_weight_0_stays_out_whatever_its_signal_and_the_floor():
    start = torch.tensor([0.6, 0.0, 0.4], dtype=torch.float64)
    found = raised(start, torch.tensor([0.0, 9.0, 0.0]).double(), 10.0, 0.05)
    assert found[1] == 0
    assert float(found.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: normalised([0.0, 0.0]), "one above 0"),
        (lambda: normalised([1.0, math.nan]), "finite"),
        (lambda: normalised([1.0, -1.0]), "not negative"),
        (lambda: tempered([1, 2], 0), "temperature must be above 0"),
        (lambda: differences(LOADS, distance="l3"), 'unknown distance "l3"'),
        (lambda: differences(LOADS, criterion="median"), 'unknown criterion "median"'),
        (lambda: differences(LOADS * 0), r"sources \[0, 1, 2\] reached"),
        (lambda: differences(LOADS[0]), "sources, experts"),
    ],
)
def test_what_cannot_be_is_refused(act, told):
    with pytest.raises(RequestError, match=told):
        act()
