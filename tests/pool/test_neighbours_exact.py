"""Exact search against brute force in float64, whatever was added, changed and removed before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.pool.neighbours import (
    NOBODY,
    Exact,
    blocks,
    both,
    inside,
    load,
    neighbours,
    within,
)
from sparing.pool.neighbours.coarse import Coarse

PRECISIONS = ["float32", "bfloat16", "int8"]


def unit(random: np.random.Generator, n: int, dim: int) -> np.ndarray:
    rows = random.standard_normal((n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def brute(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(q, n) distances in float64."""
    return np.maximum(1 - queries.astype(np.float64) @ vectors.astype(np.float64).T, 0)


def nearest(distances: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    q, n = distances.shape
    near = np.full((q, k), np.inf)
    who = np.full((q, k), NOBODY)
    order = np.argsort(distances, axis=1)[:, :k]
    near[:, : min(k, n)] = np.take_along_axis(distances, order, 1)
    who[:, : min(k, n)] = ids[order]
    return near, who


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [0, 1, 3, 700, 3000])
def test_query_and_join_equal_brute_force(
    precision: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ROWS", 40)
    random = np.random.default_rng(n)
    index, vectors, ids = Exact(24, precision=precision), unit(random, n, 24), np.arange(n) * 3 + 5
    index.add(ids, vectors)
    gone = ids[::7][:-1]
    index.remove(gone)
    left = ~np.isin(ids, gone)
    queries, radius = unit(random, 90, 24), random.uniform(0.2, 0.7, left.sum()).astype("f4")

    found = index.join(queries, 4, radius)

    truth = brute(vectors[left], queries)
    near, who = nearest(truth, ids[left], 4)
    np.testing.assert_allclose(found.distances, near, atol=1e-6)
    assert (found.ids == who).mean() > 0.999
    rows, columns = np.nonzero(truth < radius)
    np.testing.assert_array_equal(found.pairs.rows, rows)
    np.testing.assert_array_equal(found.pairs.stored, ids[left][columns])
    np.testing.assert_allclose(found.pairs.distances, truth[rows, columns], atol=1e-6)
    assert len(rows) or n < 10
    np.testing.assert_array_equal(index.query(queries, 4).ids, found.ids)
    by_id = dict(zip(ids[left].tolist(), radius, strict=True))
    asked = index.join(queries, 4, lambda some: np.array([by_id[i] for i in some], dtype="f4"))
    for one, other in zip(asked.pairs, found.pairs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_blocks_and_copies_at_their_borders(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ROWS", 16)
    monkeypatch.setattr(blocks, "COLUMNS", 64)
    random = np.random.default_rng(0)
    vectors = unit(random, 500, 8)
    vectors[60:68] = vectors[0]  # copies on both sides of a block's border
    vectors[200:420] = vectors[1]  # whole blocks of one and the same
    queries = np.concatenate([vectors[:2], unit(random, 30, 8)])
    index = Exact(8, precision=precision)
    index.add(np.arange(500), vectors)
    found = index.query(queries, 5)
    near, _ = nearest(brute(vectors, queries), np.arange(500), 5)
    np.testing.assert_allclose(found.distances, near, atol=1e-6)
    assert set(found.ids[0]) <= {0, *range(60, 68)}
    assert len(set(found.ids[1])) == 5
    assert set(found.ids[1]) <= {1, *range(200, 420)}
    assert (np.diff(found.ids[:2], axis=1) > 0).all()  # equal ones by id


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_sequence_of_changes_leaves_what_a_dictionary_holds(data: st.DataObject) -> None:
    index = Exact(4, precision=data.draw(st.sampled_from(PRECISIONS)))
    held: dict[int, np.ndarray] = {}
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    pool = unit(random, 6, 4)  # few directions: ties and copies abound
    for _ in range(data.draw(st.integers(1, 8))):
        free = sorted(set(range(100)) - held.keys())  # more than eight steps can take
        act = data.draw(st.sampled_from(["add", "add", "remove", "update"]))
        if act == "add":
            ids = data.draw(st.lists(st.sampled_from(free), max_size=12, unique=True))
        else:
            ids = data.draw(st.lists(st.sampled_from(sorted(held) or [0]), unique=True))
            ids = [i for i in ids if i in held]
        rows = pool[random.integers(6, size=len(ids))]
        if act == "remove":
            index.remove(np.array(ids, dtype=np.int64))
            for i in ids:
                del held[i]
        else:
            (index.add if act == "add" else index.update)(np.array(ids, dtype=np.int64), rows)
            fresh = dict(zip(ids, rows, strict=True))
            held = {**held, **fresh}  # a dictionary keeps its order when values change
    assert list(index.ids()) == list(held)
    assert len(index) == len(held)
    ids = np.array(list(held), dtype=np.int64)
    vectors = np.stack([held[i] for i in held]) if held else np.empty((0, 4), dtype="f4")
    np.testing.assert_array_equal(index.vectors(ids[::-1]), vectors[::-1])
    queries = np.concatenate([pool, unit(random, 2, 4)])
    radius = random.uniform(-0.1, 1.5, len(ids)).astype(np.float32)
    found, truth = index.join(queries, 3, radius), brute(vectors, queries)
    near, _ = nearest(truth, ids, 3)
    np.testing.assert_allclose(found.distances, near, atol=1e-6)
    spots = {i: n for n, i in enumerate(ids)}
    for q in range(len(queries)):
        alive = found.ids[q][found.ids[q] != NOBODY]
        assert len(set(alive)) == min(3, len(ids))
        np.testing.assert_allclose(
            found.distances[q, : len(alive)], truth[q, [spots[i] for i in alive]], atol=1e-6
        )
    pairs = set(zip(found.pairs.rows.tolist(), found.pairs.stored.tolist(), strict=True))
    sure = {(q, int(ids[n])) for q, n in zip(*np.nonzero(truth < radius - 1e-6), strict=True)}
    maybe = {(q, int(ids[n])) for q, n in zip(*np.nonzero(truth < radius + 1e-6), strict=True)}
    assert sure <= pairs <= maybe
    assert len(pairs) == len(found.pairs.rows)


def test_neighbours_in_the_incoming_batch_count() -> None:
    """Trap 8: a batch of copies must not look new to each other."""
    random = np.random.default_rng(1)
    stored, fresh = unit(random, 50, 16), unit(random, 30, 16)
    fresh[7] = fresh[3]
    fresh[9] = stored[4]
    index = neighbours(16, "exact")
    index.add(np.arange(50), stored)
    found = both(index, fresh, 3)
    everything = np.concatenate([stored, fresh])
    names = np.concatenate([np.arange(50), -2 - np.arange(30)])
    truth = brute(everything, fresh)
    truth[np.arange(30), 50 + np.arange(30)] = 9
    near, who = nearest(truth, names, 3)
    np.testing.assert_allclose(found.distances, near, atol=1e-6)
    np.testing.assert_array_equal(found.ids, who)
    assert found.ids[3, 0] == -2 - 7
    assert found.distances[3, 0] < 1e-6
    assert found.ids[9, 0] == 4
    named = both(index, fresh, 3, ids=np.arange(100, 130))
    np.testing.assert_array_equal(named.ids, np.where(who < NOBODY, 98 - who, who))
    alone = both(neighbours(16, "exact"), fresh[:1], 3)
    assert (alone.ids == NOBODY).all()
    assert np.isinf(alone.distances).all()


def test_an_index_has_no_capacity_and_takes_removed_ids_again() -> None:
    """Traps 3 and 4: the released index raises past its capacity and on replacing an item."""
    random = np.random.default_rng(2)
    index = Exact(8)
    vectors = unit(random, 5000, 8)
    for start in range(0, 5000, 700):
        part = slice(start, start + 700)
        index.add(np.arange(5000)[part], vectors[part])
    index.remove(np.arange(0, 5000, 2))
    index.add(np.array([4]), vectors[4:5])
    index.update(np.array([7]), vectors[8:9])
    assert len(index) == 2501
    assert index.query(vectors[4:5], 1).ids[0, 0] == 4
    assert index.query(vectors[8:9], 1).ids[0, 0] == 7
    assert index.query(vectors[7:8], 1).ids[0, 0] != 7


def test_saved_and_loaded_it_answers_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    index = Exact(12, precision="bfloat16")
    index.add(np.arange(200)[::-1].copy(), unit(random, 200, 12))
    index.remove(np.array([5, 9]))
    index.save(tmp_path / "index")
    again = load(tmp_path / "index")
    queries = unit(random, 20, 12)
    assert isinstance(again, Exact)
    assert again.precision == "bfloat16"
    np.testing.assert_array_equal(again.ids(), index.ids())
    for one, other in zip(index.query(queries, 4), again.query(queries, 4), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        ([1], np.ones((1, 3), dtype="f4"), "shape"),
        ([1], np.full((1, 4), np.nan, dtype="f4"), "length nan"),
        ([1], np.full((1, 4), np.inf, dtype="f4"), "length inf"),
        ([1], np.ones((1, 4), dtype="f4"), "length 2"),
        ([1, 1], np.full((2, 4), 0.5, dtype="f4"), "given twice"),
        ([0], np.full((1, 4), 0.5, dtype="f4"), "in the index already"),
        ([-3], np.full((1, 4), 0.5, dtype="f4"), "at least 0"),
        ([1, 2], np.full((1, 4), 0.5, dtype="f4"), "2 ids for 1 vectors"),
    ],
)
def test_bad_input_is_refused_and_nothing_changes(
    ids: list[int], vectors: np.ndarray, message: str
) -> None:
    index = Exact(4)
    index.add(np.array([0]), np.full((1, 4), 0.5, dtype="f4"))
    with pytest.raises(RequestError, match=message):
        index.add(np.array(ids), vectors)
    assert len(index) == 1


def test_unknown_ids_and_kinds_are_errors() -> None:
    index = Exact(4)
    for act in (index.remove, index.vectors):
        with pytest.raises(RequestError, match="id 3 is not in the index"):
            act(np.array([3]))
    with pytest.raises(RequestError, match='did you mean "exact"'):
        neighbours(4, "exakt")
    with pytest.raises(RequestError, match="one entry for each"):
        index.join(np.full((1, 4), 0.5, dtype="f4"), 1, np.zeros(2, dtype="f4"))


def test_what_a_coarse_product_cannot_tell_apart_float32_does() -> None:
    """Many neighbours within the rounding of int8 and of bfloat16."""
    random = np.random.default_rng(4)
    one = unit(random, 1, 64)
    crowd = one + 0.1 * unit(random, 400, 64) * random.uniform(0.2, 1, (400, 1))
    crowd = (crowd / np.linalg.norm(crowd, axis=1, keepdims=True)).astype("f4")
    vectors = np.concatenate([crowd, unit(random, 2000, 64)])
    near, _ = nearest(brute(vectors, one), np.arange(2400), 3)
    for precision in PRECISIONS:
        index = Exact(64, precision=precision)
        index.add(np.arange(2400), vectors)
        found = index.query(one, 3)
        np.testing.assert_allclose(found.distances, near, atol=1e-6)
        # the crowd is nearer to each other than int8 or bfloat16 can tell
        assert near[0, 2] < 0.003


@pytest.mark.parametrize("dim", [3, 64, 300])
def test_coarse_products_stay_within_their_slack(dim: int) -> None:
    random = np.random.default_rng(dim)
    rows = torch.from_numpy(unit(random, 300, dim))
    # neighbours too: their roundings are not independent of each other
    close = rows + 0.3 * torch.from_numpy(unit(random, 300, dim))
    close /= close.norm(dim=1, keepdim=True)
    cosines = torch.cat([rows, close]).double() @ rows.double().T
    for precision in ("bfloat16", "int8"):
        coarse = Coarse(precision, dim, torch.device("cpu"))
        left, right = coarse.code(torch.cat([rows, close])), coarse.code(rows)
        exact = left.double() @ right.double().T
        products = exact if precision == "int8" else (left @ right.T).double()
        if precision == "int8":
            assert torch.equal(torch._int_mm(left, right.T).double(), exact)
        assert (products / coarse.scale - cosines).abs().max() < coarse.slack
        assert (products / coarse.scale - cosines).abs().max() > coarse.slack / 100


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "FEWEST", 16)
    random = np.random.default_rng(5)
    vectors, queries = unit(random, 3000, 16), unit(random, 100, 16)
    index = Exact(16)
    index.add(np.arange(3000), vectors)
    radius = random.uniform(0.1, 0.4, 3000).astype("f4")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(index.join(queries, 4, radius))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one, more = found
    assert len(one.pairs.rows) > 100
    np.testing.assert_array_equal(one.distances, more.distances)
    np.testing.assert_array_equal(one.ids, more.ids)
    for first, second in zip(one.pairs, more.pairs, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("known", [0.0, 0.5, 1.0])
def test_neighbours_inside_a_batch_equal_brute_force(
    known: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows whose limit is known all that are nearer, of the others the nearest."""
    monkeypatch.setattr(within, "INSIDE", 40)
    random = np.random.default_rng(6)
    vectors = unit(random, 150, 8)
    vectors[100:106] = vectors[3]
    limit = np.where(random.random(150) < known, random.uniform(0.02, 0.5, 150), np.inf)
    limit = limit.astype(np.float32)
    rows, others, apart = inside(vectors, limit, 5)
    truth = brute(vectors, vectors)
    np.fill_diagonal(truth, 9)
    np.testing.assert_allclose(apart, truth[rows, others], atol=1e-6)
    assert (np.diff(rows * 150 + others) > 0).all()
    pairs = set(zip(rows.tolist(), others.tolist(), strict=True))
    fifth = np.sort(truth, axis=1)[:, 4]
    needed = truth < np.minimum(limit, fifth)[:, None] - 1e-6
    assert needed.sum() > (0 if known == 1 else 300)
    assert set(zip(*(part.tolist() for part in np.nonzero(needed)), strict=True)) <= pairs
    assert (apart < limit[rows]).all()
