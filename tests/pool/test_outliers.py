"""Outliers: planted ones, none in plain data, sparse regions, copies, degenerate input."""

from __future__ import annotations

import numpy as np
import pytest

from sparing.core.errors import RequestError
from sparing.pool.outliers import outliers


def lists(rows: np.ndarray, k: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    distance = 1 - rows @ rows.T
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1)[:, :k]
    return np.take_along_axis(distance, near, 1), near


def clustered(seed: int, spread: float = 0.15) -> np.ndarray:
    drawn = np.random.default_rng(seed)
    centres = drawn.standard_normal((20, 32))
    return centres[drawn.integers(0, 20, 1000)] + spread * drawn.standard_normal((1000, 32))


@pytest.mark.parametrize("relative", [False, True])
def test_planted_outliers_are_found_and_few_others(relative: bool) -> None:
    rows = np.concatenate([clustered(0), np.random.default_rng(1).standard_normal((15, 32))])
    distance, near = lists(rows)
    found = outliers(distance, near if relative else None)
    assert found.outliers[1000:].all()
    assert found.outliers[:1000].mean() < 0.005
    assert (found.scores[found.outliers] > found.threshold).all()


def test_plain_data_of_one_cloud_has_nearly_none() -> None:
    rows = np.random.default_rng(0).standard_normal((1500, 8))
    assert outliers(lists(rows)[0]).outliers.mean() < 0.004


def test_a_sparse_region_is_no_outlier_relative_to_its_neighbours() -> None:
    drawn = np.random.default_rng(2)
    sparse = drawn.standard_normal(32) + 0.7 * drawn.standard_normal((60, 32))
    distance, near = lists(np.concatenate([clustered(3, 0.05), sparse]))
    assert outliers(distance).outliers[1000:].mean() > 0.8
    assert outliers(distance, near).outliers[1000:].mean() < 0.1


def test_copies_of_an_outlier_do_not_hide_it() -> None:
    far = np.random.default_rng(4).standard_normal((1, 32)).repeat(4, 0)
    rows = np.concatenate([clustered(5), far + 1e-3 * np.random.default_rng(6).random(far.shape)])
    groups = np.concatenate([np.arange(1000), np.full(4, 1000)])
    distance, near = lists(rows)
    assert not outliers(distance[:, :3], near[:, :3]).outliers[1000:].any()
    assert outliers(distance, near, groups=groups).outliers[1000:].all()


def test_nothing_is_judged_of_few_items_or_without_neighbours() -> None:
    few = outliers(lists(np.random.default_rng(0).standard_normal((20, 3)))[0])
    assert not few.outliers.any()
    assert few.threshold == np.inf
    alone = outliers(np.full((50, 3), np.inf), np.full((50, 3), -1))
    assert np.isnan(alone.scores).all()
    assert not alone.outliers.any()
    assert outliers(np.zeros((0, 4))).outliers.shape == (0,)


def test_rounding_does_not_decide_among_copies() -> None:
    distance = np.abs(1e-7 * np.random.default_rng(0).standard_normal((100, 4)))
    assert not outliers(distance).outliers.any()


def test_wrong_requests() -> None:
    with pytest.raises(RequestError, match="shape"):
        outliers(np.zeros(3))
    with pytest.raises(RequestError, match="neighbours too"):
        outliers(np.zeros((3, 2)), groups=[0, 1, 2])
    with pytest.raises(RequestError, match="factor"):
        outliers(np.zeros((3, 2)), factor=-1)
