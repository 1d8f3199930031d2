"""Opening a pool goes on from the lists that were saved, if they are those of its items."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparing.core import state
from sparing.pool import members
from sparing.pool.growth import Growth
from sparing.pool.neighbours import Auto, Exact, Inverted, Neighbours, neighbours
from sparing.pool.neighbours.lists import Lists

DIM = 16
SMALL = {"limit": 64, "probes": 12, "candidates": 64}


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def drawn(seed: int, n: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, DIM))
    return unit(centres[random.integers(40, size=n)] + 0.5 * random.standard_normal((n, DIM)))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the samples that lists were learnt from."""
    sizes: list[int] = []
    train = Lists.train

    def counted(self: Lists, sample: np.ndarray) -> None:
        sizes.append(len(sample))
        train(self, sample)

    monkeypatch.setattr(Lists, "train", counted)
    return sizes


# ---- indexes -------------------------------------------------------------------------------------


def full(kind: str, vectors: np.ndarray, ids: np.ndarray) -> Neighbours:
    more = {"crossover": 300} if kind == "auto" else {"first": 300}
    index = neighbours(DIM, kind, **SMALL, **more)
    for start in range(0, len(ids), 250):
        index.add(ids[start : start + 250], vectors[start : start + 250])
    return index


@pytest.mark.parametrize("kind", ["inverted", "auto"])
def test_an_index_goes_on_from_its_outline(kind: str, trained: list[int]) -> None:
    vectors, queries, ids = drawn(0, 1500), drawn(1, 50), np.arange(1500) * 2
    index = full(kind, vectors, ids)
    index.remove(ids[::7])
    ids, vectors = np.delete(ids, np.s_[::7]), np.delete(vectors, np.s_[::7], axis=0)
    outline = index.outline()
    assert outline is not None
    assert not any(len(t) == len(ids) for t in outline.values() if isinstance(t, torch.Tensor))
    trained.clear()
    again = neighbours(DIM, kind, **SMALL)
    assert again.resume_(outline, ids, lambda some: vectors[np.searchsorted(ids, some)])
    assert not trained
    np.testing.assert_array_equal(again.ids(), ids)
    for one, other in zip(again.query(queries, 5), index.query(queries, 5), strict=True):
        np.testing.assert_array_equal(one, other)
    again.add(np.arange(5000, 5020), queries[:20])
    again.remove(ids[:20])
    assert (again.query(queries[:20], 1).ids[:, 0] == np.arange(5000, 5020)).all()


def fewer(outline: dict[str, Any]) -> None:
    outline["asked"] = np.arange(0, 1400)


def more(outline: dict[str, Any]) -> None:
    outline["asked"] = np.arange(0, 1600)


def others(outline: dict[str, Any]) -> None:
    outline["asked"] = np.arange(1, 1501)


def cut(outline: dict[str, Any]) -> None:
    outline["codes"] = outline["codes"][:-1000]


def by_another(outline: dict[str, Any]) -> None:
    outline["made"] = {**outline["made"], "by": "0.0"}


def newer(outline: dict[str, Any]) -> None:
    outline["made"] = {**outline["made"], "outline": 2}


def of_other_limit(outline: dict[str, Any]) -> None:
    outline["made"] = {**outline["made"], "limit": 1024}


def empty(outline: dict[str, Any]) -> None:
    outline.clear()


@pytest.mark.parametrize(
    "spoil", [fewer, more, others, cut, by_another, newer, of_other_limit, empty]
)
@pytest.mark.parametrize("kind", ["inverted", "auto"])
def test_an_outline_that_does_not_fit_is_left_alone(
    kind: str, spoil: Callable[[dict[str, Any]], None]
) -> None:
    vectors = drawn(0, 1700)
    outline = full(kind, vectors[:1500], np.arange(1500)).outline()
    assert outline is not None
    given: dict[str, Any] = {**outline}
    spoil(given)
    asked = given.pop("asked", np.arange(1500))
    again = neighbours(DIM, kind, **SMALL)
    assert not again.resume_(given, asked, lambda ids: vectors[ids])
    assert len(again) == 0
    again.add(asked, vectors[asked])
    assert (again.query(vectors[asked[:9]], 1).ids[:, 0] == asked[:9]).all()


def test_lists_of_vectors_of_another_size_are_left_alone() -> None:
    outline = full("inverted", drawn(0, 500), np.arange(500)).outline()
    assert outline is not None
    wide = Inverted(2 * DIM, limit=64)
    outline["made"]["dim"] = 2 * DIM  # as a fault would have it
    assert not wide.resume_(outline, np.arange(500), lambda ids: np.zeros((len(ids), 2 * DIM)))


@pytest.mark.parametrize("kind", ["exact", "graph", "auto"])
def test_an_index_that_is_quick_to_fill_has_no_outline(kind: str) -> None:
    index = neighbours(DIM, kind)
    index.add(np.arange(50), drawn(0, 50))
    assert index.outline() is None
    assert not neighbours(DIM, kind).resume_({}, np.arange(50), lambda ids: drawn(0, 50)[ids])


# ---- pools ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(members, "neighbours", partial(neighbours, crossover=300, **SMALL))
    return


def same(batch: torch.Tensor) -> torch.Tensor:
    return batch


def opened(path: Path) -> Growth:
    return Growth(path, encoder=same)


def pool_at(path: Path, vectors: np.ndarray) -> None:
    with opened(path) as pool:
        for start in range(0, len(vectors), 300):
            pool.add(torch.from_numpy(vectors[start : start + 300]))


def right(pool: Growth, vectors: np.ndarray) -> None:
    """All items are in lists, and nearly all neighbours are true."""
    near = pool._members.main
    assert isinstance(near.index, Auto)
    assert isinstance(near.index.inner, Inverted)
    assert near.index.inner.lists is not None
    held = pool.kept()
    np.testing.assert_array_equal(np.sort(near.index.ids()), held)
    np.testing.assert_array_equal(np.sort(near.index.inner.lists.ids()), held)
    exact = Exact(DIM)
    exact.add(held, vectors[held])
    true = exact.query(vectors[held], 5).distances[:, 4:]
    found = near.index.query(vectors[held], 5).distances
    assert (found <= true + 1e-3).mean() > 0.95


def test_a_pool_that_is_opened_again_has_its_lists(tmp_path: Path, trained: list[int]) -> None:
    vectors = np.concatenate([drawn(0, 1200), drawn(0, 60)])  # some are copies
    pool_at(tmp_path / "pool", vectors + np.float32(1e-4) * drawn(5, 1260))
    assert trained
    trained.clear()
    with opened(tmp_path / "pool") as pool:
        assert not trained
        right(pool, vectors)
        before = pool.gains()
        pool.add(torch.from_numpy(drawn(1, 100)))
        assert len(pool) == 1360
    with opened(tmp_path / "pool") as pool:
        assert not trained
        np.testing.assert_allclose(pool.gains()[:1260], before, atol=0.05)


def test_lists_of_fewer_items_than_the_store_has_take_in_the_rest(
    tmp_path: Path, trained: list[int]
) -> None:
    """As after a kill: what is saved is from before the last items came."""
    vectors = drawn(0, 1500)
    pool_at(tmp_path / "pool", vectors[:900])
    shutil.copytree(tmp_path / "pool" / "growth", tmp_path / "older")
    pool_at(tmp_path / "pool", vectors[900:])
    shutil.rmtree(tmp_path / "pool" / "growth")
    shutil.move(tmp_path / "older", tmp_path / "pool" / "growth")
    trained.clear()
    with opened(tmp_path / "pool") as pool:
        assert not trained
        right(pool, vectors)


def truncated(folder: Path) -> None:
    path = folder / state.TENSORS
    path.write_bytes(path.read_bytes()[:-100])


def flipped(folder: Path) -> None:
    path = folder / state.TENSORS
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 255
    path.write_bytes(bytes(held))


def of_another_format(folder: Path) -> None:
    saved = state.read(folder)
    state.save(folder, saved.tree["members"], meta={**saved.meta, "growth": 1})


def of_another_package(folder: Path) -> None:
    saved = state.read(folder)
    saved.tree["indexes"]["main"]["made"]["by"] = "0.0"
    state.save(folder, saved.tree, meta=saved.meta)


def of_fewer_items(folder: Path) -> None:
    """Lists that are not those of the items beside them."""
    saved = state.read(folder)
    lists = full("auto", drawn(7, 700), np.arange(700)).outline()
    assert lists is not None
    saved.tree["indexes"]["main"] = lists
    state.save(folder, saved.tree, meta=saved.meta)


@pytest.mark.parametrize(
    "spoil", [truncated, flipped, of_another_format, of_another_package, of_fewer_items]
)
def test_lists_that_are_damaged_or_stale_are_made_anew(
    tmp_path: Path, spoil: Callable[[Path], None], trained: list[int]
) -> None:
    vectors = drawn(0, 900)
    pool_at(tmp_path / "pool", vectors)
    spoil(tmp_path / "pool" / "growth")
    trained.clear()
    with opened(tmp_path / "pool") as pool:
        assert trained
        right(pool, vectors)
