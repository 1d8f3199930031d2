"""Planted label noise is found; copies of one wrong label do not vouch for each other."""

from __future__ import annotations

import numpy as np
import pytest

from sparing.core.errors import RequestError
from sparing.pool.label_issues import (
    LabelIssues,
    by_neighbours,
    by_regression,
    judged_classes,
    label_issues,
)


def planted(seed: int, size: int = 1200, classes: int = 6, noise: float = 0.15):  # type: ignore[no-untyped-def]
    drawn = np.random.default_rng(seed)
    centres = drawn.standard_normal((classes, 24))
    true = drawn.integers(0, classes, size)
    rows = centres[true] + 0.8 * drawn.standard_normal((size, 24))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    wrong = drawn.random(size) < noise
    labels = np.where(wrong, (true + drawn.integers(1, classes, size)) % classes, true)
    return rows.astype(np.float32), labels, true, wrong


def global_state() -> str:
    return str(np.random.get_state())  # noqa: NPY002


def lists(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distance = 1 - rows @ rows.T
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1)[:, :k]
    return np.take_along_axis(distance, near, 1), near


def quality_of(found: LabelIssues, wrong: np.ndarray) -> tuple[float, float]:
    hit = (found.issues & wrong).sum()
    return hit / max(1, found.issues.sum()), hit / wrong.sum()


@pytest.mark.parametrize("how", ["neighbours", "regression"])
def test_planted_noise_is_found(how: str) -> None:
    rows, labels, true, wrong = planted(0)
    classes = judged_classes(labels)
    if how == "neighbours":
        probabilities = by_neighbours(labels, *lists(rows, 15), classes)
    else:
        probabilities = by_regression(labels, rows, classes)
    before = global_state()
    found = label_issues(labels, probabilities, classes)
    assert global_state() == before
    precision, recall = quality_of(found, wrong)
    assert precision > 0.85
    assert recall > 0.85
    assert (found.likelier[found.issues & wrong] == true[found.issues & wrong]).mean() > 0.9
    assert np.nanmean(found.quality[~wrong]) > 3 * np.nanmean(found.quality[wrong])


def test_clean_labels_are_let_be() -> None:
    rows, labels, _, _ = planted(1, noise=0.0)
    classes = judged_classes(labels)
    found = label_issues(labels, by_neighbours(labels, *lists(rows, 15), classes), classes)
    assert found.issues.mean() < 0.02


def test_a_judge_that_is_worse_than_the_labels_judges_nothing() -> None:
    """Vectors that say little of the class: right labels would be dropped by the hundred."""
    drawn = np.random.default_rng(0)
    labels = drawn.integers(0, 6, 1200)
    weak = drawn.standard_normal((1200, 24)) + 0.8 * np.eye(24)[labels]
    rows = (weak / np.linalg.norm(weak, axis=1, keepdims=True)).astype(np.float32)
    classes = judged_classes(labels)
    chance = by_neighbours(labels, *lists(rows, 20), classes)
    assert label_issues(labels, chance, classes, trust=0).issues.mean() > 0.3
    found = label_issues(labels, chance, classes)
    assert not found.issues.any()
    assert 0.2 < found.agreement < 0.5
    assert "none was judged" in found.detail


@pytest.mark.parametrize("how", ["neighbours", "regression"])
def test_copies_of_a_wrong_label_do_not_vouch_for_each_other(how: str) -> None:
    rows, labels, true, _ = planted(2, size=600, noise=0.0)
    labels = labels.copy()
    labels[:20] = (true[:20] + 1) % 6
    jitter = 1e-3 * np.random.default_rng(0).standard_normal((160, 24)).astype(np.float32)
    rows = np.concatenate([rows, np.repeat(rows[:20], 8, 0) + jitter])
    labels = np.concatenate([labels, np.repeat(labels[:20], 8)])
    groups = np.concatenate([np.arange(600), np.repeat(np.arange(20), 8)])
    wrong = np.concatenate([np.arange(600) < 20, np.ones(160, bool)])
    classes = judged_classes(labels)
    recall = {}
    for name, held in (("alone", None), ("grouped", groups)):
        if how == "neighbours":
            found = by_neighbours(labels, *lists(rows, 40), classes, groups=held)
        else:
            found = by_regression(labels, rows, classes, groups=held, strength=100.0)
        recall[name] = quality_of(label_issues(labels, found, classes), wrong)[1]
    assert recall["grouped"] > 0.8
    assert recall["alone"] < recall["grouped"] - 0.3


def test_probabilities_of_neighbours_by_hand() -> None:
    labels = [0, 1, 1, 5, -1]
    distances = np.array([[0.0, 0.1, 0.2, np.inf]] * 5)
    near = np.array([[0, 1, 3, -1], [0, 2, 4, -1], [1, 0, 0, 0], [0, 1, 2, -1], [0, 0, 0, -1]])
    made = by_neighbours(labels, distances, near, [0, 1], prior=1.0)
    reach = 1.1 * 0.1  # of the first: itself, then one of class 1, then one that is not judged
    vote = 1 - 0.1 / reach
    np.testing.assert_allclose(
        made[0], [1 / 3 / (vote + 1), (vote + 2 / 3) / (vote + 1)], rtol=1e-5
    )
    np.testing.assert_allclose(made.sum(1), 1, rtol=1e-6)
    assert (
        by_neighbours([0, 1], np.zeros((2, 1)), [[-1], [-1]], [0, 1]).tolist() == [[0.5, 0.5]] * 2
    )


def test_the_unlabelled_and_rare_classes_are_not_judged() -> None:
    rows, labels, _, _ = planted(3, size=300)
    labels = labels.copy()
    labels[:10], labels[10:13] = -1, 99
    classes = judged_classes(labels)
    assert -1 not in classes
    assert 99 not in classes
    for found in (
        by_regression(labels, rows, classes),
        by_neighbours(labels, *lists(rows, 9), classes),
    ):
        judged = label_issues(labels, found, classes)
        assert not judged.issues[:13].any()
        assert np.isnan(judged.quality[:13]).all()
        assert (judged.likelier[:13] == -1).all()
        assert judged.issues[13:].any()


def test_one_class_none_and_nothing() -> None:
    rows = np.eye(6, 4, dtype=np.float32)
    for labels in ([3] * 6, [-1] * 6):
        classes = judged_classes(labels)
        found = label_issues(labels, by_regression(labels, rows, classes), classes)
        assert not found.issues.any()
    none = label_issues([], np.zeros((0, 2)), [0, 1])
    assert none.issues.shape == (0,)


def test_wrong_requests_are_told() -> None:
    with pytest.raises(RequestError, match="one row an item"):
        label_issues([0, 1], np.ones((2, 3)), [0, 1])
    with pytest.raises(RequestError, match='did you mean "prune_by_class"'):
        label_issues([0, 1], np.ones((2, 2)), [0, 1], rule="prune-by-class")
    with pytest.raises(RequestError, match="folds"):
        by_regression([0, 1], np.ones((2, 2), np.float32), [0, 1], folds=1)
