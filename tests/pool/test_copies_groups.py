"""Groups of near copies against a plain greedy loop, and that no order of arrival matters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.pool.copies.groups import Pairs, pairs, pairs_of_lists, ranks, representatives


def plain(n: int, edges: set[tuple[int, int]], rank: np.ndarray) -> list[int]:
    near = {
        at: {b for a, b in edges if a == at} | {a for a, b in edges if b == at} for at in range(n)
    }
    chosen: list[int] = []
    for at in np.argsort(rank):
        if not near[int(at)] & set(chosen):
            chosen.append(int(at))
    owner = []
    for at in range(n):
        beside = [c for c in chosen if c in near[at]]
        owner.append(at if at in chosen else min(beside, key=lambda c: rank[c]))
    return owner


graphs = st.integers(1, 14).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
        st.permutations(range(n)),
    )
)


@given(graphs)
@settings(deadline=None)
def test_equal_to_a_greedy_loop_and_free_of_order(
    drawn: tuple[int, set[tuple[int, int]], list[int], list[int]],
) -> None:
    n, edges, quality, order = drawn
    edges = {(a, b) for a, b in edges if a != b}
    hashes = np.arange(n) * 7 % 17
    one, two = [a for a, _ in edges], [b for _, b in edges]
    found = pairs(one, two, np.zeros(len(edges)))
    ids = np.arange(n)
    rank = ranks(quality, hashes)
    made = representatives(found, ids, rank)
    assert made.tolist() == plain(n, edges, rank)
    # the same items under other ids, listed in another order
    renamed = np.array(order) * 10 + 5
    moved = pairs(renamed[one], renamed[two], np.zeros(len(edges)))
    listed = np.argsort(renamed)
    again = representatives(
        moved, renamed[listed], ranks(np.array(quality)[listed], hashes[listed])
    )
    back = np.argsort(renamed)
    assert again.tolist() == renamed[made][back].tolist()


def test_a_long_drift_is_cut_where_it_leaves_its_representative() -> None:
    angle = np.arange(40) * 0.05
    rows = np.stack([np.cos(angle), np.sin(angle)], 1)
    distance = 1 - rows @ rows.T
    limit = 1 - np.cos(0.12)
    one, two = np.nonzero(distance <= limit)
    found = pairs(one, two, distance[one, two])
    quality = np.random.default_rng(0).random(40)
    made = representatives(found, np.arange(40), ranks(quality, np.arange(40)))
    assert distance[np.arange(40), made].max() <= limit + 1e-7
    assert 40 / 5 <= len(set(made)) <= 40 / 2
    assert (quality[made] >= quality).all()


def test_a_drift_of_ever_worse_items_ends() -> None:
    n = 2000
    found = pairs(np.arange(n - 1), np.arange(1, n), np.zeros(n - 1))
    made = representatives(found, np.arange(n), np.arange(n))
    assert made.tolist() == [at - at % 2 for at in range(n)]


def test_pairs_are_once_in_order_at_their_shortest() -> None:
    found = pairs([5, 1, 1, 3, 2], [1, 5, 1, 9, -1], [0.2, 0.1, 0.0, 0.5, 0.0], limit=0.3)
    assert found.first.tolist() == [1]
    assert found.second.tolist() == [5]
    np.testing.assert_allclose(found.distance, [0.1])
    assert len(found) == 1


def test_pairs_of_lists_take_what_is_within_the_limit() -> None:
    distances = np.array([[0.0, 0.01, np.inf], [-1e-7, 0.04, 0.9]], np.float32)
    neighbours = np.array([[10, 30, -1], [20, 30, 10]])
    found = pairs_of_lists(np.array([10, 20]), distances, neighbours, 0.04)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [
        (10, 30),
        (20, 30),
    ]
    assert len(pairs_of_lists(np.array([10, 20]), distances, neighbours, 0.0)) == 0


def test_ranks_go_by_quality_then_by_hash() -> None:
    wide = np.array([[2, 0], [1, 9], [1, 3], [0, 0]], np.uint64)
    assert ranks([1.0, 1.0, 1.0, 0.0], wide).tolist() == [2, 1, 0, 3]
    raw = np.array([b"b", b"a"], dtype="S1")
    assert ranks([0, 0], raw).tolist() == [1, 0]


def test_wrong_requests() -> None:
    empty = Pairs(first=np.array([1]), second=np.array([9]), distance=np.zeros(1, np.float32))
    with pytest.raises(RequestError, match="not among"):
        representatives(empty, np.array([1, 2]), np.array([0, 1]))
    with pytest.raises(RequestError, match="NaN"):
        ranks([np.nan], [0])
    with pytest.raises(RequestError, match="one an item"):
        ranks([1.0], [0, 1])
    with pytest.raises(RequestError, match="three arrays"):
        pairs([1], [2, 3], [0.0])
    with pytest.raises(RequestError, match="neighbour lists"):
        pairs_of_lists(np.array([1]), np.zeros((2, 2)), np.zeros((2, 2)), 0.1)
