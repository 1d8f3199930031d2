"""Choices in proportion to gain: their chances, and what is estimated from them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.choice import Chosen, choose, generator, in_rounds

WEIGHTS = np.array([0.5, 1.0, 2.0, 4.0, 8.0, 0.25, np.nan, 0.0], np.float32)
VALUES = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 100.0, 200.0])


def test_the_first_choice_is_in_proportion_to_the_weights() -> None:
    random = generator(0)
    counts = np.zeros(8)
    for _ in range(6000):
        counts[choose(WEIGHTS, 1, random).places] += 1
    share = np.nan_to_num(WEIGHTS) / np.nansum(WEIGHTS)
    error = (counts - 6000 * share) / np.sqrt(6000 * share * (1 - share) + 1e-9)
    assert np.abs(error).max() < 4
    assert counts[6:].tolist() == [0, 0]


def test_without_replacement_it_is_the_choice_one_by_one() -> None:
    """The chance of a pair is that of drawing its two items in turn, either first."""
    weights = np.array([1.0, 2.0, 5.0])
    random = generator(1)
    pairs = {(0, 1): 0, (0, 2): 0, (1, 2): 0}
    for _ in range(6000):
        one, two = choose(weights, 2, random).places.tolist()
        pairs[(one, two)] += 1
    for (one, two), count in pairs.items():
        a, b = weights[one] / 8, weights[two] / 8
        chance = a * b / (1 - a) + b * a / (1 - b)
        assert abs(count - 6000 * chance) < 4 * np.sqrt(6000 * chance * (1 - chance))


@pytest.mark.parametrize("rounds", [1, 3])
def test_estimates_are_unbiased(rounds: int) -> None:
    """The sum over all items that can be chosen, whatever the rounds do to the weights."""
    random = generator(2)

    def discount_(weights: NDArray[np.floating], places: NDArray[np.int64]) -> None:
        weights[places // 2 * 2] *= 0.3  # an item discounts its neighbour, or is gone itself
        weights[places // 2 * 2 + 1] *= 0.3

    sums, ones = [], []
    for _ in range(6000):
        chosen = in_rounds(WEIGHTS, 4, random, rounds, discount_)
        assert len(set(chosen.places.tolist())) == 4
        sums.append(chosen.total(VALUES[chosen.places]))
        ones.append(chosen.total(np.ones(4)))
    for drawn, true in ((sums, VALUES[:6].sum()), (ones, 6)):
        assert abs(np.mean(drawn) - true) < 4 * np.std(drawn) / np.sqrt(len(drawn))


def test_one_round_is_the_plain_choice() -> None:
    plain = choose(WEIGHTS, 3, generator(5))
    told = in_rounds(WEIGHTS, 3, generator(5), 1, lambda w, p: None)
    for one, two in zip(_parts(plain), _parts(told), strict=True):
        assert one.tolist() == two.tolist()
    assert plain.weight.tolist() == pytest.approx((1 / plain.chance).tolist())


def test_as_many_can_be_chosen_as_there_are_whatever_is_discounted() -> None:
    """Items at one place: once k of them are chosen the others add nothing at all."""
    weights = np.ones(50, np.float32)
    weights[40:] = 0

    def nothing_(left: np.ndarray, places: np.ndarray) -> None:
        left[~np.isnan(left)] = 0

    for n in (20, 40):
        chosen = in_rounds(weights, n, generator(0), 4, nothing_)
        assert len(np.unique(chosen.places)) == n
        assert (chosen.places < 40).all()
    with pytest.raises(RequestError, match="cannot choose 41: 40 of 50 weigh more than 0"):
        in_rounds(weights, 41, generator(0), 4, nothing_)


def test_everything_has_chance_one() -> None:
    chosen = choose(WEIGHTS, 6, generator(0))
    assert chosen.places.tolist() == [0, 1, 2, 3, 4, 5]
    assert chosen.weight.tolist() == [1.0] * 6
    assert chosen.mean(VALUES[:6]) == pytest.approx(VALUES[:6].mean())
    assert chosen.mean(VALUES[:6], 8) == pytest.approx(VALUES[:6].sum() / 8)
    assert choose(np.ones(3), 3, generator(0)).places.tolist() == [0, 1, 2]
    assert choose(np.empty(0), 0, generator(0)).places.size == 0


def test_wrong_requests_are_told() -> None:
    with pytest.raises(RequestError, match="cannot choose 7: 6 of 8 weigh more than 0"):
        choose(WEIGHTS, 7, generator(0))
    with pytest.raises(RequestError, match="cannot choose 9: 6 of 8"):
        choose(WEIGHTS, 9, generator(0))
    for bad in (-1.0, np.inf):
        with pytest.raises(RequestError, match="finite and not negative"):
            choose(np.array([1.0, bad]), 1, generator(0))
    with pytest.raises(RequestError, match="must be a vector"):
        choose(np.ones((2, 2)), 1, generator(0))
    with pytest.raises(RequestError, match="2 were chosen"):
        choose(np.ones(3), 2, generator(0)).total(np.ones(3))


def test_draws_do_not_touch_the_global_generator() -> None:
    state = np.random.get_state()[1]  # noqa: NPY002
    choose(WEIGHTS, 2, generator(0, 3))
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def _parts(chosen: Chosen) -> tuple[NDArray[np.generic], ...]:
    return chosen.places, chosen.chance, chosen.weight
