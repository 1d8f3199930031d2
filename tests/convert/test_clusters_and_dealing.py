"""Clusters of equal size, and hidden units dealt out by scores."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.convert.clusters import assign, balanced_kmeans
from sparing.convert.dealing import deal_once, overlapping, shared_by_most
from sparing.convert.split import at_random, contiguous, sizes, split
from sparing.core.errors import RequestError


def everything(groups: list[torch.Tensor], always: torch.Tensor) -> list[int]:
    return torch.cat([*groups, always]).sort().values.tolist()


@given(st.integers(2, 60), st.integers(1, 9), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_partitions_hold_each_unit_once_whatever_divides(
    units: int, routed: int, residual: int, seed: int
):
    """The published random split fails unless experts divide the width."""
    n = routed + residual
    generator = torch.Generator().manual_seed(seed)
    if units < n:
        with pytest.raises(RequestError, match="take fewer"):
            at_random(units, n, residual, generator)
        return
    scores = torch.rand(routed, units, generator=generator)
    for groups, always in (
        at_random(units, n, residual, generator),
        contiguous(units, n, residual),
        deal_once(scores, residual),
        *([shared_by_most(scores, residual)] if residual else []),
    ):
        assert everything(groups, always) == list(range(units))
        lengths = [len(group) for group in groups]
        assert max(lengths) - min(lengths) <= 1
        made = split(groups, always)
        assert made.once(units)
        assert made.width % 4 == 0
        assert made.width - max(lengths) < 4


def test_sizes_are_even():
    assert sizes(172, 8) == [22] * 4 + [21] * 4
    assert sizes(8, 8) == [1] * 8


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_assignments_have_the_sizes_asked_for_even_with_ties(count: int, n: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(0, 3, (n, count), generator=generator).double()
    wanted = [n // count + (e < n % count) for e in range(count)]
    found = assign(costs, wanted)
    assert torch.bincount(found, minlength=count).tolist() == wanted


def test_assignments_are_near_the_best_ones():
    """Against all assignments, of six rows to three clusters of two."""
    generator = torch.Generator().manual_seed(0)
    lost = []
    for _ in range(20):
        costs = torch.rand(6, 3, generator=generator)
        orders = {tuple(p) for p in itertools.permutations([0, 0, 1, 1, 2, 2])}
        best = min(float(costs[range(6), list(order)].sum()) for order in orders)
        found = float(costs.gather(1, assign(costs, [2, 2, 2])[:, None]).sum())
        assert found >= best - 1e-6
        lost.append(found / best - 1)
    assert sum(lost) / len(lost) < 0.1


def test_planted_clusters_are_found():
    generator = torch.Generator().manual_seed(1)
    centres = torch.eye(4) * 10
    truth = torch.arange(40) % 4
    rows = centres[truth] + torch.randn(40, 4, generator=generator) * 0.1
    labels, means = balanced_kmeans(rows, [10] * 4, generator)
    for cluster in range(4):
        assert len(set(labels[truth == cluster].tolist())) == 1
    torch.testing.assert_close(means[labels], centres[truth], atol=0.2, rtol=0)
    # of length 1 they are four directions still
    scaled = rows * torch.linspace(0.1, 10, 40)[:, None]
    labels, _ = balanced_kmeans(scaled, [10] * 4, generator, cosine=True)
    assert all(len(set(labels[truth == cluster].tolist())) == 1 for cluster in range(4))


def test_rows_that_are_all_equal_are_dealt_out_too():
    labels, _ = balanced_kmeans(torch.ones(7, 3), [3, 2, 2], torch.Generator())
    assert torch.bincount(labels).tolist() == [3, 2, 2]


def test_gradient_gives_units_to_the_cluster_that_needs_them():
    scores = torch.full((2, 6), 0.1)
    scores[0, [0, 3, 5]] = 1.0
    scores[1, [1, 2, 4]] = 1.0
    groups, always = deal_once(scores)
    assert [group.tolist() for group in groups] == [[0, 3, 5], [1, 2, 4]]
    assert always.tolist() == []


def test_inner_takes_each_clusters_best_and_may_repeat():
    scores = torch.tensor([[9.0, 8, 1, 2], [9.0, 1, 8, 2]])
    groups = overlapping(scores, 2)
    assert [sorted(group.tolist()) for group in groups] == [[0, 1], [0, 2]]
    assert not split(groups).once(4)


def test_inter_keeps_what_most_clusters_want_always_on():
    # all want 0 and 1 first, then each its own
    scores = torch.full((3, 8), 0.1)
    scores[:, :2] = 10
    for cluster in range(3):
        scores[cluster, 2 + 2 * cluster : 4 + 2 * cluster] = 5
    groups, always = shared_by_most(scores, 1)
    assert always.sort().values.tolist() == [0, 1]
    assert [group.tolist() for group in groups] == [[2, 3], [4, 5], [6, 7]]


def test_scores_that_are_not_numbers_count_as_none():
    scores = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    scores[0, 1] = torch.nan
    groups, always = deal_once(scores)
    assert everything(groups, always) == list(range(6))
