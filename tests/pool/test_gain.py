"""The gain against its definition: random orders of arrival, exact and drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.gain import expected, plain_weights, published, remainder, weights


def at_arrival(distances: NDArray[np.float64], came: list[bool], k: int) -> float:
    """The released rule for an item whose neighbours, ascending, came before it or not."""
    before = [d for d, yes in zip(distances.tolist(), came, strict=True) if yes][:k]
    return (sum(before) + (k - len(before))) / k


def by_permutations(distances: NDArray[np.float64], k: int, sure: list[bool]) -> float:
    """The mean over all orders of an item and its neighbours, the sure ones always before it."""
    unsure = [j for j, yes in enumerate(sure) if not yes]
    total = 0.0
    for order in itertools.permutations([-1, *unsure]):
        earlier = set(order[: order.index(-1)])
        total += at_arrival(distances, [s or j in earlier for j, s in enumerate(sure)], k)
    return total / math.factorial(len(unsure) + 1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_gain_is_the_mean_over_all_orders_of_arrival(data: st.DataObject) -> None:
    others = data.draw(st.integers(0, 6))
    k = data.draw(st.integers(1, 5))
    room = data.draw(st.integers(0, 3))
    lengths = data.draw(st.lists(st.floats(0, 2, width=32), min_size=others, max_size=others))
    sure = data.draw(st.lists(st.booleans(), min_size=others, max_size=others))
    row = np.sort(np.array(lengths, np.float64))
    padded = np.append(row, np.full(room, np.inf))[None]
    told = by_permutations(row, k, [False] * others)
    assert expected(padded, others, k)[0] == pytest.approx(told, abs=1e-6)
    marks = np.append(np.array(sure, bool), np.zeros(room, bool))[None]
    told = by_permutations(row, k, sure)
    assert expected(padded, others, k, sure=marks)[0] == pytest.approx(told, abs=1e-6)


def test_the_gain_is_the_mean_over_drawn_orders() -> None:
    random = np.random.default_rng(0)
    points = random.standard_normal((40, 5))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    between = 1 - points @ points.T
    draws = 4000
    values = np.zeros((draws, 40))
    for number in range(draws):
        place = random.permutation(40)
        came = np.where(place[None, :] < place[:, None], between, np.inf)
        values[number] = published(np.sort(came, axis=1), 4)
    np.fill_diagonal(between, np.inf)
    gains = expected(np.sort(between, axis=1), 39, 4)
    error = (values.mean(0) - gains) / (values.std(0) / math.sqrt(draws))
    assert np.abs(error).max() < 4.5
    assert abs(error.mean()) < 1


@pytest.mark.parametrize("k", [1, 4, 7])
def test_weights_and_their_remainder_sum_to_one(k: int) -> None:
    for listed in (0, 1, 3, 4, 10, 500):
        found = plain_weights(listed, k)
        assert found.sum() + remainder(listed, k) == pytest.approx(1, abs=1e-12)
        none = np.zeros((1, listed), bool)
        assert weights(none, k)[0] == pytest.approx(found, abs=1e-12)
    every = weights(np.ones((1, 10), bool), k)[0]
    assert every.tolist() == pytest.approx([1 / k] * k + [0] * (10 - k))


def test_an_empty_pool_gives_gain_one() -> None:
    nothing = np.empty((1, 0))
    assert published(nothing).tolist() == [1.0]
    assert expected(nothing, 0).tolist() == [1.0]
    assert expected(np.full((1, 10), np.inf), 0).tolist() == [1.0]


def test_the_published_rule_is_the_mean_distance_to_the_nearest() -> None:
    found = published(np.array([[0.1, 0.2, 0.3, 0.4, 0.9], [0.5, np.inf, np.inf, np.inf, np.inf]]))
    assert found.tolist() == pytest.approx([0.25, (0.5 + 3) / 4])


def test_twins_share_the_gain_of_one() -> None:
    """However many copies there are, together they count as (k+1)/2 single items."""
    for copies in (7, 30, 200):
        row = np.append(np.zeros(copies - 1), np.full(5000 - copies, 0.8))[None]
        share = expected(row, row.shape[1], 4)[0]
        assert copies * share == pytest.approx(2.5 * 0.8, rel=0.01)


def test_wrong_distances_are_told() -> None:
    with pytest.raises(RequestError, match=r"shape \(n, m\)"):
        expected(np.zeros(3), 3)
    with pytest.raises(RequestError, match="NaN"):
        published(np.array([[np.nan]]))
    with pytest.raises(RequestError, match="at least 1"):
        published(np.zeros((1, 1)), 0)
    with pytest.raises(RequestError, match="2 neighbours are listed, but there are 1 others"):
        expected(np.zeros((1, 2)), 1)
