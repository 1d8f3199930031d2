"""Exactly k, ties to the lowest expert, groups by their best scores: against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparing.experts import selection
from sparing.experts.selection import Groups, normalised, top_k_map


def plain(
    scores: list[float], k: int, active: list[bool], groups: Groups | None = None
) -> set[int]:
    """One token's choice, by sorting."""
    alive = [e for e, on in enumerate(active) if on]
    kept = set(alive)
    if groups is not None:
        size = len(scores) // groups.count

        def worth(group: int) -> tuple[bool, float]:
            own = [scores[e] for e in alive if e // size == group]
            return bool(own), sum(sorted(own, reverse=True)[: groups.best])

        best = sorted(range(groups.count), key=lambda g: (*(-w for w in worth(g)), g))
        kept = {e for e in alive if e // size in best[: groups.kept]}
    order = sorted(alive, key=lambda e: (e not in kept, -scores[e], e))
    return set(order[:k])


def chosen_of(found: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in found]


@st.composite
def problems(draw):
    slots = draw(st.sampled_from([1, 2, 4, 6, 8]))
    tokens = draw(st.integers(0, 5))
    # few values, so that ties are common; all are exact in binary, so that sums are too
    level = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0])
    scores = draw(st.lists(st.lists(level, min_size=slots, max_size=slots), min_size=tokens,
                           max_size=tokens))  # fmt: skip
    active = draw(st.lists(st.booleans(), min_size=slots, max_size=slots).filter(any))
    k = draw(st.integers(0, slots))
    count = draw(st.sampled_from([g for g in (1, 2, 3, 4) if slots % g == 0]))
    kept = draw(st.integers(1, count))
    best = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([None, Groups(count=count, kept=kept, best=best)]))
    each = draw(st.lists(st.integers(0, slots), min_size=tokens, max_size=tokens))
    return torch.tensor(scores).view(tokens, slots), k, torch.tensor(active), groups, each


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_choice_is_that_of_a_sort(problem):
    scores, k, active, groups, each = problem
    alive = int(active.sum())
    found = top_k_map(scores, max(k, 1), active, groups)
    assert found.dtype == torch.bool
    assert found.shape == scores.shape
    expected = [plain(row, max(k, 1), active.tolist(), groups) for row in scores.tolist()]
    assert chosen_of(found) == expected
    assert found.sum(1).tolist() == [min(max(k, 1), alive)] * len(scores)
    # and with a number for each token, 0 included
    by_token = top_k_map(scores, torch.tensor(each, dtype=torch.int64), active, groups)
    assert chosen_of(by_token) == [
        plain(row, n, active.tolist(), groups) for row, n in zip(scores.tolist(), each, strict=True)
    ]


def test_all_equal_scores_take_the_first_experts():
    found = top_k_map(torch.full((3, 5), 0.2), 2, torch.tensor([False, True, True, True, True]))
    assert chosen_of(found) == [{1, 2}] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_scores_still_give_exactly_k_active_experts(value):
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    scores[0] = value
    scores[1, 2] = value
    active = torch.tensor([True, True, True, False, True, True])
    for groups in (None, Groups(count=3, kept=2)):
        found = top_k_map(scores, 3, active, groups)
        assert found.sum(1).tolist() == [3] * 4
        assert not found[:, 3].any()


def test_the_short_way_without_ties_chooses_as_the_long_one(monkeypatch):
    scores = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    active = torch.arange(9) != 4
    for k in (1, 3, 8, 9):
        short = top_k_map(scores, k, active)
        with monkeypatch.context() as patched:
            patched.setattr(selection, "_without_ties", lambda *_: None)
            assert top_k_map(scores, k, active).equal(short)
        assert selection._without_ties(scores, min(k, 8), active.expand(200, 9)) is not None
    assert selection._without_ties(torch.ones(2, 3), 1, active[:3].expand(2, 3)) is None


def test_deepseek_v2_and_v3_differ_where_one_good_expert_meets_two_fair_ones():
    scores = torch.tensor([[0.9, 0.0, 0.6, 0.5]])
    active = torch.ones(4, dtype=torch.bool)
    by_max = top_k_map(scores, 2, active, Groups(count=2, kept=1, best=1))
    by_two = top_k_map(scores, 2, active, Groups(count=2, kept=1, best=2))
    assert (chosen_of(by_max), chosen_of(by_two)) == ([{0, 1}], [{2, 3}])


def test_weights_of_the_chosen_sum_to_one_and_of_none_are_zero():
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [0.0, 0.0, 0.5]]).requires_grad_()
    chosen = torch.tensor([[True, True, False], [False] * 3, [True, True, False]])
    found = normalised(weights, chosen)
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.6, 0.0], [0.0] * 3, [0.0] * 3]))
    found.square().sum().backward()
    assert weights.grad is not None
    assert torch.isfinite(weights.grad).all()
    assert not weights.grad[1].any()
