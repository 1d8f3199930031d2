"""The parts of the search by lists: ranking, places of ids, threads, and where splits put items."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from sparing.pool.neighbours import NOBODY, Inverted, ranking
from sparing.pool.neighbours.lists import Lists
from sparing.pool.neighbours.rows import Rows


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def drawn(seed: int, n: int, dim: int = 16) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, dim)))


@pytest.mark.parametrize("far", [0, 2**31 - 1, 2**40], ids=["small", "at the end", "large"])
@pytest.mark.parametrize("k", [0, 1, 4, 9, 12])
def test_the_best_are_those_of_a_sort_by_distance_and_then_by_id(k: int, far: int) -> None:
    random = np.random.default_rng(0)
    distances = random.integers(0, 4, (50, 9)).astype(np.float32) / 3  # many are equal
    ids = random.permuted(np.tile(np.arange(9), (50, 1)), axis=1) + np.where(
        random.random((50, 9)) < 0.3, far, 0
    )
    nobody = random.random((50, 9)) < 0.2
    distances[nobody], ids[nobody] = np.inf, NOBODY
    found = ranking.best(distances, ids, k)
    assert found.distances.shape == found.ids.shape == (50, k)
    assert found.distances.dtype == np.float32
    for row in range(50):
        held = sorted(zip(distances[row].tolist(), ids[row].tolist(), strict=True))
        want = (held + [(np.inf, NOBODY)] * k)[:k]
        got = list(zip(found.distances[row].tolist(), found.ids[row].tolist(), strict=True))
        assert got == want


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_candidates_are_ranked_by_their_vectors(dtype: torch.dtype, error: float) -> None:
    vectors, queries = drawn(1, 300), drawn(2, 500)
    places = np.random.default_rng(3).integers(-1, 300, (500, 20))
    found = ranking.of_places(queries, places, torch.from_numpy(vectors).to(dtype))
    true = 1 - np.einsum("qd,qcd->qc", queries, vectors[places])
    true[places < 0] = np.inf
    np.testing.assert_allclose(found, true, atol=error)
    assert found.min() >= 0
    none = ranking.of_places(queries[:0], places[:0], torch.from_numpy(vectors))
    assert none.shape == (0, 20)


@pytest.mark.parametrize("step", [1, 3, 50], ids=["each", "every third", "few"])
@pytest.mark.parametrize("rising", [True, False])
def test_ids_are_found_where_they_are(step: int, rising: bool) -> None:
    """While they come and go, against a dictionary."""
    rows = Rows(16, (torch.float32,), torch.device("cpu"))
    random = np.random.default_rng(11)
    held: list[int] = []
    asked = np.arange(0, 1200 * step)
    for turn in range(12):
        ids = np.arange(turn * 80, turn * 80 + 80) * step + 100
        if not rising:
            random.shuffle(ids)
        rows.add(ids, drawn(turn, 80))
        held.extend(ids.tolist())
        gone = random.choice(held, 30 if turn != 7 else 300, replace=False)
        rows.remove(gone)
        held = [one for one in held if one not in set(gone.tolist())]
        rows.close()
        places = rows.find(asked)
        np.testing.assert_array_equal(np.flatnonzero(places >= 0), np.sort(held))
        np.testing.assert_array_equal(rows.at[places[held]], held)
        assert rows.alive[places[held]].all()
    assert rows.find(np.array([-5, 10**12])).tolist() == [NOBODY, NOBODY]


def test_the_search_works_with_as_many_threads_as_torch() -> None:
    before = torch.get_num_threads()
    index = Inverted(16, first=50)
    index.add(np.arange(100), drawn(5, 100))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            index.query(drawn(6, 2), 4)
            assert faiss.omp_get_max_threads() == count
    finally:
        torch.set_num_threads(before)


def test_items_of_a_list_that_is_split_go_to_the_nearest_list() -> None:
    centres, random = np.random.default_rng(7).standard_normal((300, 16)), np.random.default_rng(8)
    vectors = unit(
        centres[random.integers(300, size=6000)] + 0.7 * random.standard_normal((6000, 16))
    )
    lists = Lists(16, 64, 0)
    lists.train(vectors[:200])
    for start in range(0, 6000, 50):
        lists.add(np.arange(start, start + 50), vectors[start : start + 50])
        lists.split(lambda ids: vectors[ids], 64)
    nearest = (vectors @ lists.centroids.T).argmax(1)
    inverted = lists._index.invlists
    mine = np.empty(6000, np.int64)
    for number, length in enumerate(lists.lengths().tolist()):
        mine[faiss.rev_swig_ptr(inverted.get_ids(number), length)] = number
    assert len(lists.centroids) > 100
    share = (nearest == mine).mean()
    assert share > 0.84, share  # .78 where they go to the two halves only


def test_less_is_looked_at_where_recall_stays_high() -> None:
    """Far groups of few are found in any case; how much is looked at stays within its bounds."""
    random = np.random.default_rng(10)
    vectors = unit(np.repeat(drawn(11, 400), 5, axis=0) + 0.02 * random.standard_normal((2000, 16)))
    index = Inverted(16, first=300, limit=32, probes=16, candidates=64, watch=0.9)
    index.add(np.arange(2000), vectors)
    assert index.mend_().near >= 0.91
    assert (index.probes, index.candidates) == (8, 32)
    index.mend_()
    assert (index.probes, index.candidates) == (8, 32)
    index.mend_(limit=1.1)  # it cannot be
    assert (index.probes, index.candidates) == (64, 256)
    index.mend_(limit=0.9)
    assert (index.probes, index.candidates) == (8, 32)
    # where recall hangs on it, nothing falls
    hard = Inverted(16, first=300, limit=32, probes=4, candidates=8, watch=0)
    hard.add(np.arange(2000), drawn(12, 2000))
    found = hard.mend_(limit=0)
    assert (hard.probes, hard.candidates) == (2, 4)
    hard.probes, hard.candidates = 4, 8
    assert hard.mend_(limit=found.near).near >= found.near + 0.01
    assert (hard.probes, hard.candidates) != (2, 4)
