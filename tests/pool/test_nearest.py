"""The table of neighbours against brute force, whatever came and went."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool import nearest
from sparing.pool.gain import expected, published
from sparing.pool.nearest import NOBODY, Nearest, nearest_columns
from sparing.pool.neighbourhood import Neighbourhood
from sparing.pool.neighbours import neighbours

DIM = 6


def unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def brute(vectors: NDArray[np.float32], keep: int) -> NDArray[np.float32]:
    between = 1 - vectors @ vectors.T
    np.fill_diagonal(between, np.inf)
    return nearest_columns(between, keep)[0]


def pool(keep: int = 4, frozen: bool = False) -> Neighbourhood:
    return Neighbourhood(neighbours(DIM), k=3, keep=keep, frozen=frozen)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_after_any_adding_and_removing_it_equals_brute_force(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    vectors = unit(random.standard_normal((160, DIM)))
    for _ in range(data.draw(st.integers(0, 20))):  # copies: many at the very same place
        vectors[random.integers(160)] = vectors[random.integers(160)]
    items = pool()
    there = np.zeros(160, bool)
    came = 0
    for adds in data.draw(st.lists(st.booleans(), min_size=1, max_size=10)):
        if adds:
            n = min(data.draw(st.integers(0, 40)), 160 - came)
            ids = np.arange(came, came + n)
            items.add_(ids, vectors[ids])
            there[ids], came = True, came + n
        elif there.any():
            gone = random.permutation(np.flatnonzero(there))[: data.draw(st.integers(1, 30))]
            items.leave_(gone)
            there[gone] = False
        here = np.flatnonzero(there)
        rows = items.table.distances[here].astype(np.float32)
        assert rows == pytest.approx(brute(vectors[here], 4), abs=1e-3)
        assert items.table.present().tolist() == there[:came].tolist()
        who = items.table.who[here]
        held = who != NOBODY
        own = np.broadcast_to(here[:, None], who.shape)
        assert there[who[held]].all()
        assert (who != own).all()
        told = 1 - np.einsum("nd,nd->n", vectors[own[held]], vectors[who[held]])
        assert rows[held] == pytest.approx(np.maximum(told, 0), abs=1e-3)
        assert np.isnan(items.gains()).tolist() == (~there[:came]).tolist()


def test_a_batch_counts_its_own_neighbours() -> None:
    """In one batch or one by one: the same table (the released code by batches forgets them)."""
    vectors = unit(np.random.default_rng(0).standard_normal((50, DIM)))
    whole, single = pool(), pool()
    whole.add_(np.arange(50), vectors)
    for at in range(50):
        single.add_(np.arange(at, at + 1), vectors[at : at + 1])
    assert whole.gains() == pytest.approx(single.gains(), abs=1e-3)


def test_the_published_rule_is_that_of_the_loop_over_items() -> None:
    vectors = unit(np.random.default_rng(1).standard_normal((60, DIM)))
    items = pool(frozen=True)
    for at in range(0, 60, 25):
        items.add_(np.arange(at, min(at + 25, 60)), vectors[at : at + 25])
    told = [
        published(np.sort(1 - vectors[:at] @ vectors[at])[None, :3].clip(0), 3)[0]
        for at in range(60)
    ]
    assert items.gains() == pytest.approx(np.array(told), abs=1e-5)
    assert told[0] == 1


def test_gains_do_not_depend_on_the_order_of_arrival() -> None:
    vectors = unit(np.random.default_rng(2).standard_normal((300, DIM)))
    order = np.random.default_rng(3).permutation(300)
    one, two = pool(), pool()
    one.add_(np.arange(300), vectors)
    for at in range(0, 300, 70):
        two.add_(np.arange(at, min(at + 70, 300)), vectors[order][at : at + 70])
    # the tail is learnt from items drawn by place: within its scatter
    assert two.gains() == pytest.approx(one.gains()[order], rel=0.02)


def test_kept_neighbours_and_the_tail_come_near_all_neighbours() -> None:
    random = np.random.default_rng(4)
    centres = random.standard_normal((40, DIM))
    vectors = unit(centres[random.integers(0, 40, 1500)] + 0.2 * random.standard_normal((1500, 6)))
    items = Neighbourhood(neighbours(DIM))
    items.add_(np.arange(1500), vectors)
    exact = expected(brute(vectors, 1499), 1499)
    gains = items.gains()
    assert gains.mean() == pytest.approx(exact.mean(), rel=0.02)
    assert np.corrcoef(gains, exact)[0, 1] > 0.95
    cut = expected(items.table.distances, 1499)  # the bound without a tail
    assert cut.mean() < 0.8 * exact.mean()


def test_a_group_larger_than_the_list_is_not_lost() -> None:
    """Forty copies fill every list of ten with distance 0; the tail still tells their share."""
    random = np.random.default_rng(5)
    vectors = unit(random.standard_normal((800, DIM)))
    vectors[:40] = vectors[0]
    items = Neighbourhood(neighbours(DIM))
    items.add_(np.arange(800), vectors)
    gains = items.gains()
    exact = expected(brute(vectors, 799), 799)
    assert gains[:40].sum() == pytest.approx(exact[:40].sum(), rel=0.35)
    assert expected(items.table.distances[:40], 799).max() < 1e-3


def test_newcomers_beyond_room_and_known_ones_do_nothing() -> None:
    table = Nearest(2, np.float32)
    table.grow_(5)
    assert table.radius().tolist() == [np.inf] * 5
    table.merge_((np.array([0, 0, 0]), np.array([1, 2, 3]), np.array([0.3, 0.1, 0.2])))
    assert table.who[0].tolist() == [2, 3]
    assert table.merge_((np.array([0]), np.array([4]), np.array([0.2]))).size == 0
    rows = table.merge_((np.array([0]), np.array([2]), np.array([0.05])))
    assert table.who[0].tolist() == [2, 3]
    assert rows.tolist() == [0]
    again = Nearest.of(table.state())
    assert again.distances.tolist() == table.distances.tolist()
    assert len(again) == 5
    with pytest.raises(RequestError, match="do not fit"):
        Nearest.of({"who": table.who, "distances": table.distances[:2]})


def test_an_item_takes_at_most_fifty_two_bytes() -> None:
    table = Nearest()
    for _ in range(50):
        table.grow_(100)
    assert table.bytes / 5000 <= 52


def test_places_beyond_three_bytes_are_held_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_SMALL", 70_000)
    table = Nearest(2)
    table.grow_(69_999)
    table.set_(np.array([5]), np.array([[69_998, NOBODY]]), np.array([[0.25, np.inf]]))
    small = table.bytes
    table.grow_(80_000)
    assert table.bytes / small > 2.2
    table.merge_((np.array([5]), np.array([140_000]), np.array([0.125])))
    assert table.who[5].tolist() == [140_000, 69_998]
    assert table.who[149_998].tolist() == [NOBODY, NOBODY]
    assert table.who[69_998].tolist() == [NOBODY, NOBODY]
