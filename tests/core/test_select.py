from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.core.select import _kth, allocate, choose, choose_mask, weighted_choice

few_values = st.lists(st.integers(-2, 2).map(float) | st.just(math.inf), min_size=1, max_size=40)


@given(few_values, st.data(), st.booleans())
def test_choose_takes_exactly_the_k_best_and_ties_by_lowest_index(values, data, largest):
    k = data.draw(st.integers(0, len(values)))
    chosen = choose(torch.tensor(values), k, largest=largest)
    sign = -1 if largest else 1
    expected = sorted(range(len(values)), key=lambda i: (sign * values[i], i))[:k]
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(expected)


@given(few_values, st.data(), st.integers(0, 5))
def test_seeded_ties_choose_the_same_scores_and_repeat(values, data, seed):
    k = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    first = choose(scores, k, generator=torch.Generator().manual_seed(seed))
    again = choose(scores, k, generator=torch.Generator().manual_seed(seed))
    plain = choose(scores, k)
    assert first.equal(again)
    assert len(set(first.tolist())) == k
    assert sorted(scores[first].tolist()) == sorted(scores[plain].tolist())


def test_seeded_ties_are_uniform():
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    counts = torch.zeros(6)
    for _ in range(4000):
        counts[choose(scores, 3, generator=generator)] += 1
    assert counts[0] == 4000
    assert counts[5] == 0
    # each of four ties is in with p = 1/2; five standard deviations
    assert (counts[1:5] - 2000).abs().max() < 5 * math.sqrt(4000 / 4)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
)
def test_choose_takes_any_dtype(dtype):
    scores = torch.tensor([0, 1, 0, 1, 1]).to(dtype)
    assert choose(scores, 2).tolist() == [1, 3]
    assert choose(scores, 3, largest=False).tolist() == [0, 1, 2]


@given(few_values, st.data(), st.sampled_from([torch.float32, torch.float64, torch.int64]))
def test_the_border_is_the_same_on_every_device(values, data, dtype):
    # on the CPU it is found by numpy, elsewhere by torch
    scores = torch.tensor(values).nan_to_num(posinf=9).to(dtype)
    k = data.draw(st.integers(0, len(values) - 1))
    found = _kth(scores, k)
    assert found.dtype == dtype
    assert found.item() == scores.kthvalue(k + 1).values.item() == scores.sort().values[k].item()


def test_choose_keeps_the_count_in_large_ties():
    scores = torch.zeros(100_001)
    scores[::7] = 1.0
    assert choose(scores, 40_000).numel() == 40_000
    mask = choose_mask(scores, 40_000)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == 40_000
    assert bool(mask[::7].all())


@pytest.mark.parametrize("k", [-1, 4])
def test_choose_rejects_an_impossible_count(k):
    with pytest.raises(RequestError, match=f"cannot choose {k} of 3"):
        choose(torch.zeros(3), k)


def test_choose_rejects_nan_and_says_where():
    with pytest.raises(RequestError, match="1 of 3 scores are NaN, the first at index 1"):
        choose(torch.tensor([0.0, math.nan, 1.0]), 1)


def test_choose_rejects_a_matrix():
    with pytest.raises(RequestError, match="expected a vector"):
        choose(torch.zeros(2, 2), 1)


@given(
    st.lists(st.sampled_from([0.0, 1e-300, 1e-3, 1.0, 1e300]), min_size=1, max_size=30),
    st.data(),
    st.integers(0, 3),
)
def test_weighted_choice_is_without_replacement_and_never_takes_zero(weights, data, seed):
    positive = sum(w > 0 for w in weights)
    k = data.draw(st.integers(0, positive))
    tensor = torch.tensor(weights, dtype=torch.float64)
    chosen = weighted_choice(tensor, k, torch.Generator().manual_seed(seed))
    assert len(set(chosen.tolist())) == k
    assert bool((tensor[chosen] > 0).all())
    assert chosen.equal(weighted_choice(tensor, k, torch.Generator().manual_seed(seed)))


def test_weighted_choice_draws_in_proportion():
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    trials = 6000
    counts = torch.zeros(4)
    pairs = torch.zeros(4, 4)
    for _ in range(trials):
        counts[weighted_choice(weights, 1, generator)] += 1
        a, b = weighted_choice(weights, 2, generator).tolist()
        pairs[a, b] += 1
    p = weights / 10
    assert ((counts / trials - p).abs() < 5 * (p * (1 - p) / trials).sqrt()).all()
    # the pair {2, 3}: either first, then the other among those left
    expected = 0.3 * 4 / 7 + 0.4 * 3 / 6
    assert abs(pairs[2, 3] / trials - expected) < 5 * math.sqrt(expected / trials)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_weighted_choice_rejects_bad_weights(weights):
    with pytest.raises(RequestError, match="finite and not negative"):
        weighted_choice(torch.tensor(weights), 1, torch.Generator())


def test_weighted_choice_rejects_too_few():
    with pytest.raises(RequestError, match="1 weigh over 0"):
        weighted_choice(torch.tensor([1.0, 0.0]), 2, torch.Generator())


shares = st.lists(st.floats(0, 1e6) | st.just(0.0), min_size=1, max_size=20).filter(any)


@given(st.integers(0, 10**18), shares)
def test_allocate_is_exact_and_within_one_of_the_quota(total, values):
    counts = allocate(total, torch.tensor(values, dtype=torch.float64)).tolist()
    assert sum(counts) == total
    whole = math.fsum(values)
    for count, value in zip(counts, values, strict=True):
        assert count >= 0
        assert value > 0 or count == 0
        assert abs(count - total * value / whole) < 1 + total * 1e-12


def test_allocate_breaks_ties_by_lowest_index():
    assert allocate(5, torch.ones(3)).tolist() == [2, 2, 1]
    assert allocate(10, torch.tensor([1, 2, 7])).tolist() == [1, 2, 7]
    assert allocate(0, torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("total", "values", "message"),
    [
        (1, [0.0, 0.0], "one must be above 0"),
        (1, [1.0, -0.5], "must not be negative"),
        (1, [1.0, math.nan], "must be finite"),
        (-1, [1.0], "at least 0"),
        (1, [[1.0]], "must be a vector"),
    ],
)
def test_allocate_rejects_nonsense(total, values, message):
    with pytest.raises(RequestError, match=message):
        allocate(total, torch.tensor(values))


def test_selection_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), random.getstate()
    generator = torch.Generator().manual_seed(1)
    choose(torch.ones(9), 4, generator=generator)
    weighted_choice(torch.ones(9), 4, generator)
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
