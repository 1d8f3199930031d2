"""Inverted lists, the graph, and the change from exact search, against brute force."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparing.core.errors import RequestError, RunError
from sparing.pool.neighbours import (
    NOBODY,
    Auto,
    Exact,
    Inverted,
    Neighbours,
    both,
    load,
    neighbours,
    probe,
)
from sparing.pool.neighbours.lists import two_means

DIM = 20


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(seed: int, n: int, dim: int = DIM, spread: float = 0.5) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, dim))
    return unit(centres[random.integers(40, size=n)] + spread * random.standard_normal((n, dim)))


def nearest(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    far = np.maximum(1 - queries.astype(np.float64) @ vectors.astype(np.float64).T, 0)
    return np.sort(far, axis=1)[:, :k]


def recall(found: np.ndarray, true: np.ndarray, tolerance: float = 1e-3) -> float:
    return float((found <= true[:, -1:] + tolerance).mean())


def small(kind: str, **options: object) -> Neighbours:
    given = {"first": 300, "limit": 64, "probes": 12} if kind == "inverted" else {}
    return neighbours(DIM, kind, **{**given, **options})


@pytest.mark.parametrize("kind", ["inverted", "graph"])
def test_grown_changed_and_shrunk_it_finds_what_brute_force_finds(
    kind: str, tmp_path: Path
) -> None:
    vectors, queries = clustered(0, 3000), clustered(1, 100)
    ids = np.arange(3000) * 2 + 10
    index = small(kind)
    for start in range(0, 3000, 250):
        index.add(ids[start : start + 250], vectors[start : start + 250])
    assert recall(index.query(queries, 4).distances, nearest(vectors, queries, 4)) > 0.97
    fresh = clustered(2, 60)
    index.update(ids[100:160], fresh)
    vectors[100:160] = fresh
    index.remove(ids[::3])
    left = np.ones(3000, dtype=bool)
    left[::3] = False
    assert len(index) == left.sum()
    np.testing.assert_array_equal(index.ids(), ids[left])
    np.testing.assert_allclose(index.vectors(ids[left][:50]), vectors[left][:50], atol=1e-3)

    found = index.query(queries, 4)
    assert not np.isin(found.ids, ids[::3]).any()
    assert recall(found.distances, nearest(vectors[left], queries, 4)) > 0.97
    mine = ids[100:160][left[100:160]]
    assert (index.query(fresh[left[100:160]], 1).ids[:, 0] == mine).mean() > 0.97

    index.save(tmp_path / "index")
    again = load(tmp_path / "index")
    assert type(again) is type(index)
    np.testing.assert_array_equal(again.ids(), index.ids())
    np.testing.assert_array_equal(again.query(queries, 4).ids, index.query(queries, 4).ids)
    more = clustered(5, 200)
    again.add(np.arange(200) + 10_000, more)
    assert (again.query(more[:20], 1).distances < 1e-3).all()


@pytest.mark.parametrize("kind", ["inverted", "graph", "auto"])
def test_pairs_of_a_join_are_right_and_nearly_complete(kind: str) -> None:
    vectors, queries = clustered(0, 1500), clustered(1, 80)
    index = small(kind)
    index.add(np.arange(1500), vectors)
    radius = nearest(vectors, vectors, 6)[:, 5].astype(np.float32)  # self and five others
    found = index.join(queries, 4, radius)
    far = 1 - queries.astype(np.float64) @ vectors.astype(np.float64).T
    true = set(zip(*(part.tolist() for part in np.nonzero(far < radius)), strict=True))
    pairs = list(zip(found.pairs.rows.tolist(), found.pairs.stored.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) > 100
    np.testing.assert_allclose(found.pairs.distances, far[tuple(np.array(pairs).T)], atol=5e-4)
    assert (far < radius + 5e-4)[tuple(np.array(pairs).T)].all()
    assert len(true & set(pairs)) > 0.95 * len(true)
    asked = index.join(queries, 4, lambda ids: radius[ids])
    for one, other in zip(asked.pairs, found.pairs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["exact", "inverted", "graph", "auto"])
def test_nobody_few_and_copies(kind: str) -> None:
    """Also hnswlib's own trap: it raises where fewer than k are left."""
    index = small(kind)
    rows = clustered(3, 5)
    assert (index.query(rows, 3).ids == NOBODY).all()
    index.add(np.arange(2), rows[:2])
    found = index.query(rows, 3)
    assert (np.sort(found.ids, axis=1)[:, 0] == NOBODY).all()
    assert (np.isinf(found.distances) == (found.ids == NOBODY)).all()
    assert both(index, rows, 4).ids.min() < NOBODY
    index.add(np.arange(2, 902), np.repeat(rows[2:3], 900, axis=0))
    found = index.query(rows[2:3], 4)
    assert (found.distances < 1e-3).all()
    assert len(set(found.ids[0])) == 4
    index.remove(np.arange(902))
    assert len(index) == 0
    assert (index.query(rows, 3).ids == NOBODY).all()
    index.add(np.arange(3), rows[:3])
    np.testing.assert_array_equal(index.query(rows[:3], 1).ids[:, 0], np.arange(3))


def test_lists_split_as_they_grow_and_hold_every_item_once() -> None:
    index = small("inverted")
    assert isinstance(index, Inverted)
    vectors = clustered(4, 4000)
    index.add(np.arange(300), vectors[:300])
    assert index.lists is not None
    few = len(index.lists.centroids)
    for start in range(300, 4000, 100):
        index.add(np.arange(start, start + 100), vectors[start : start + 100])
    lists = index.lists
    assert len(lists.centroids) > 5 * few
    assert lists.lengths().sum() == len(lists) == 4000
    while lists.split(index.vectors, 64):
        pass
    assert lists.lengths().max() <= 64
    np.testing.assert_allclose(np.linalg.norm(lists.centroids, axis=1), 1, atol=1e-5)
    everyone = lists.candidates(vectors[:1], 4000, len(lists.centroids))
    np.testing.assert_array_equal(np.sort(everyone[0]), np.arange(4000))


def test_a_probe_sees_what_is_lost_and_mending_brings_it_back() -> None:
    vectors = clustered(6, 3000, spread=2.0)
    index = Inverted(DIM, first=300, limit=32, probes=1, candidates=8, watch=0)
    index.add(np.arange(3000), vectors)
    before = probe(index, sample=200)
    assert before.near < 0.8 < before.itself
    assert probe(small_exact(vectors), sample=50) == (1.0, 1.0, 50)
    # what the probe says is what brute force says
    rows = vectors[:200]
    found = index.query(rows, 5).distances[:, 1:]
    assert abs(recall(found, nearest(vectors, rows, 5)[:, 1:]) - before.near) < 0.1
    index._most = [4, 64]
    index._built = 0  # as if it had grown since its lists were made
    after = index.mend_(limit=0.999)
    assert (index.probes, index.candidates) == (4, 64)
    assert after.near > before.near + 0.1
    assert index._coming is not None  # it could not be mended by looking further
    index.add(np.arange(3000, 3010), clustered(7, 10))
    assert index._coming is None
    assert index.lists is not None
    assert index.lists.lengths().sum() == 3010


def small_exact(vectors: np.ndarray) -> Exact:
    index = Exact(DIM)
    index.add(np.arange(len(vectors)), vectors)
    return index


def test_a_rebuild_goes_on_while_items_come_change_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparing.pool.neighbours import inverted

    monkeypatch.setattr(inverted, "SLICE", 200)
    vectors = clustered(8, 3000)
    index = small("inverted", watch=0)
    assert isinstance(index, Inverted)
    index.add(np.arange(1000), vectors[:1000])
    index.rebuild_()
    for steps, start in enumerate(range(1000, 1600, 100)):
        index.add(np.arange(start, start + 100), vectors[start : start + 100])
        index.remove(np.arange(steps * 90, steps * 90 + 60))
        index.update(np.arange(990, 1000), vectors[steps * 10 : steps * 10 + 10])
    assert index._coming is None
    assert index.lists is not None
    everyone = index.lists.candidates(vectors[:1], 2000, len(index.lists.centroids))[0]
    np.testing.assert_array_equal(np.sort(everyone[everyone >= 0]), np.sort(index.ids()))


def test_vectors_may_be_read_from_elsewhere(tmp_path: Path) -> None:
    vectors = clustered(9, 2000)
    read = lambda ids: vectors[ids]  # noqa: E731
    index = small("inverted", read=read)
    index.add(np.arange(2000), vectors)
    assert isinstance(index, Inverted)
    assert index.rows.tensors == ()
    own = small("inverted")
    own.add(np.arange(2000), vectors)
    queries = clustered(10, 50)
    assert isinstance(own, Inverted)
    index.candidates = own.candidates = 200
    one, other = index.query(queries, 4), own.query(queries, 4)
    assert (one.ids == other.ids).mean() > 0.98
    np.testing.assert_allclose(one.distances, nearest(vectors, queries, 4), atol=0.05)
    index.save(tmp_path / "index")
    with pytest.raises(RequestError, match="read="):
        load(tmp_path / "index")
    again = load(tmp_path / "index", read=read)
    np.testing.assert_array_equal(again.query(queries, 4).ids, one.ids)


def test_auto_is_exact_and_then_has_lists(tmp_path: Path) -> None:
    vectors, queries = clustered(11, 1200), clustered(12, 50)
    index = neighbours(DIM, crossover=700, limit=64, probes=12)
    assert isinstance(index, Auto)
    index.add(np.arange(600), vectors[:600])
    assert isinstance(index.inner, Exact)
    index.save(tmp_path / "exact")
    index.add(np.arange(600, 1200), vectors[600:])
    assert isinstance(index.inner, Inverted)
    assert index.inner.lists is not None
    np.testing.assert_array_equal(index.ids(), np.arange(1200))
    assert recall(index.query(queries, 4).distances, nearest(vectors, queries, 4)) > 0.97
    index.save(tmp_path / "lists")
    for name in ("exact", "lists"):
        again = load(tmp_path / name)
        assert isinstance(again, Auto)
        assert again.inner.kind == ("exact" if name == "exact" else "inverted")
        again.add(np.array([5000]), queries[:1])
        assert again.query(queries[:1], 1).ids[0, 0] == 5000


def test_without_faiss_auto_stays_exact_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparing.pool.neighbours.auto.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    index = neighbours(DIM, crossover=100)
    with pytest.warns(RuntimeWarning, match=r"sparing\[index\]"):
        index.add(np.arange(200), clustered(13, 200))
    index.add(np.arange(200, 300), clustered(14, 100))
    assert len(index) == 300
    for kind, extra in (("inverted", "index"), ("graph", "graph")):
        with pytest.raises(RequestError, match=rf'pip install "sparing\[{extra}\]"'):
            neighbours(DIM, kind)


def test_removed_vectors_are_not_saved(tmp_path: Path) -> None:
    """Forgetting an item forgets its vector also where only a mark was set at first."""
    vectors = clustered(15, 400)
    for kind in ("exact", "inverted", "graph"):
        index = small(kind, **({"vectors": "float32"} if kind == "inverted" else {}))
        index.add(np.arange(400), vectors)
        index.remove(np.arange(10))
        index.save(tmp_path / kind)
        held = b"".join(path.read_bytes() for path in (tmp_path / kind).iterdir())
        assert vectors[50].tobytes() in held
        assert not any(vectors[i].tobytes() in held for i in range(10))


def test_a_newer_or_other_directory_is_an_error(tmp_path: Path) -> None:
    from sparing.core import state

    state.save(tmp_path / "other", {"a": 1})
    with pytest.raises(RunError, match="holds no index"):
        load(tmp_path / "other")
    state.save(tmp_path / "newer", {}, meta={"neighbours": "exact", "format": 9})
    with pytest.raises(RunError, match="has format 9"):
        load(tmp_path / "newer")
    state.save(tmp_path / "kind", {}, meta={"neighbours": "tree", "format": 1})
    with pytest.raises(RunError, match='of kind "tree"'):
        load(tmp_path / "kind")


def test_two_means_tells_groups_apart_and_copies_not() -> None:
    assert two_means(np.repeat(clustered(0, 1), 9, axis=0)) is None
    one, other = clustered(0, 2)
    random = np.random.default_rng(0)
    noise = 0.05 * random.standard_normal((60, DIM)).astype("f4")
    found = two_means(unit(np.concatenate([one + noise[:20], other + noise[20:]])))
    assert found is not None
    near = np.sort((found @ np.stack([one, other]).T).argmax(0))
    np.testing.assert_array_equal(near, [0, 1])
    lonely = two_means(unit(np.concatenate([one + noise[:1], other + 0.1 * noise])))
    assert lonely is not None  # cut at the median: halves, not one against all
    assert (found @ found.T)[0, 1] < (lonely @ lonely.T)[0, 1]


def test_importing_the_pool_imports_no_index_package() -> None:
    code = (
        "import sys, sparing.pool.neighbours; "
        "sys.exit(any(name in sys.modules for name in ('faiss', 'hnswlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["exact", "inverted", "graph", "auto"])
@pytest.mark.parametrize("n", [0, 500])
def test_no_rows_and_no_neighbours_have_their_shapes(kind: str, n: int) -> None:
    index = small(kind)
    index.add(np.arange(n), clustered(16, n))
    index.remove(np.empty(0, dtype=np.int64))
    assert len(index) == n
    found = both(index, clustered(16, 0), 4, radius=np.full(n, 0.3, dtype=np.float32))
    assert found.distances.shape == found.ids.shape == (0, 4)
    assert len(found.pairs.rows) == 0
    assert index.query(clustered(17, 2), 0).ids.shape == (2, 0)
