"""Labels that are likely wrong, by confident learning on what the other items say.

Northcutt, Jiang, Chuang 2021, *Confident Learning* (arXiv 1911.00068); the rule is cleanlab's. The
probabilities are out of sample: an item's own label, and those of its near copies, have no voice.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown
from sparing.pool.items import UNLABELLED

RULES: Final = ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning")
LEAST: Final = 5
"""A class with fewer items is not judged, nor proposed."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LabelIssues:
    """issues (n,) bool; likelier (n,) the class that is, -1 where not judged; quality (n,) the
    probability of the given label, NaN where not judged; probabilities (n, c) of ``classes`` (c,);
    agreement: the share of judged labels that are the likeliest class; detail: why nothing was
    found an issue, else "".
    """

    issues: NDArray[np.bool_]
    likelier: NDArray[np.int64]
    quality: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    classes: NDArray[np.int64]
    agreement: float
    detail: str = ""


def label_issues(
    labels: Any,
    probabilities: NDArray[np.floating[Any]],
    classes: Any,
    *,
    rule: str = RULES[0],
    trust: float = 0.5,
) -> LabelIssues:
    """Which labels (n,) are likely wrong, given out-of-sample probabilities (n, c) of ``classes``.

    Where fewer than ``trust`` of the labels are the likeliest class, the probabilities are worse
    than the labels that they would judge, and none is an issue: confident learning would take most
    of its own errors for those of the labels.

    Items without a label (-1), of a class not among ``classes`` or with NaN probabilities are not
    judged. Raises RequestError without cleanlab installed.
    """
    given = np.asarray(labels, np.int64)
    known = np.asarray(classes, np.int64)
    if probabilities.shape != (len(given), len(known)):
        raise RequestError(
            f"probabilities of shape {probabilities.shape} for {len(given)} labels and "
            f"{len(known)} classes; expected one row an item, one column a class"
        )
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    require_number("trust", trust, 0.0, 1.0)
    place, judged = _places(given, known)
    judged &= ~np.isnan(probabilities).any(1)
    issues = np.zeros(len(given), bool)
    likelier = np.full(len(given), -1, np.int64)
    quality = np.full(len(given), np.nan, np.float32)
    rows = np.flatnonzero(judged)
    if len(rows):
        held = np.asarray(probabilities, np.float64)[rows]
        held /= held.sum(1, keepdims=True)
        likelier[rows] = known[held.argmax(1)]
        quality[rows] = held[np.arange(len(rows)), place[rows]]
        issues[rows] = _found(place[rows], held, rule)
        # a class that is the likeliest one is no issue, however unlikely it is
        issues &= likelier != given
    agreement = float((likelier[rows] == given[rows]).mean()) if len(rows) else float("nan")
    detail = ""
    if agreement < trust:
        issues[:] = False
        detail = (
            f"the likeliest class is the given one for {agreement:.0%} of the labels only, so none "
            "was judged; take an encoder that tells the classes apart, or more neighbours"
        )
    return LabelIssues(
        issues=issues,
        likelier=likelier,
        quality=quality,
        probabilities=probabilities.astype(np.float32),
        classes=known,
        agreement=agreement,
        detail=detail,
    )


def judged_classes(labels: Any, least: int = LEAST) -> NDArray[np.int64]:
    """The classes with at least ``least`` items, ascending; -1 is none."""
    found, counts = np.unique(np.asarray(labels, np.int64), return_counts=True)
    enough: NDArray[np.int64] = found[(counts >= least) & (found != UNLABELLED)]
    return enough


def by_neighbours(
    labels: Any,
    distances: NDArray[np.floating[Any]],
    neighbours: NDArray[np.integer[Any]],
    classes: Any,
    *,
    groups: Any = None,
    prior: float = 1.0,
) -> NDArray[np.float32]:
    """(n, c) probabilities from the labels of the nearest: distances and positions (n, k).

    Each neighbour votes by its closeness, 1 for the nearest down to 0 beyond the last, with
    ``prior`` votes more spread as the classes are. groups (n,), the representatives' ids: copies of
    an item have no vote on it, and copies of another have one vote together. A neighbour of -1,
    the item itself, or one without a label among ``classes`` has no vote. The noise of the labels
    is in the votes too: 20 to 40 neighbours judge better than 10.
    """
    require_number("prior", prior, 1e-6)
    given, known = np.asarray(labels, np.int64), np.asarray(classes, np.int64)
    place, judged = _places(given, known)
    size, count = len(given), len(known)
    near = np.asarray(neighbours, np.int64)
    far = np.where(np.isfinite(distances), distances, np.nan).astype(np.float64)
    valid = (near >= 0) & (near != np.arange(size)[:, None]) & judged[near]
    together = np.ones(near.shape)
    if groups is not None:
        held = np.unique(np.asarray(groups), return_inverse=True)[1]
        valid &= held[near] != held[:, None]
        together = _in_row(np.where(valid, held[near], -1))
    reach = np.nanmax(np.where(valid, far, 0.0), axis=1, initial=0.0)[:, None] * 1.1 + 1e-9
    votes = np.where(valid, 1 - np.nan_to_num(far, nan=0.0).clip(0) / reach, 0.0) / together
    cells = np.arange(size)[:, None] * count + place[near]
    total = np.bincount(cells[valid], votes[valid], size * count).reshape(size, count)
    share = np.bincount(place[judged], minlength=count) / max(1, judged.sum())
    made: NDArray[np.float32] = (
        (total + prior * share) / (total.sum(1, keepdims=True) + prior)
    ).astype(np.float32)
    return made


def by_regression(
    labels: Any,
    vectors: NDArray[np.float32],
    classes: Any,
    *,
    groups: Any = None,
    folds: int = 5,
    strength: float = 1.0,
    seed: int = 0,
) -> NDArray[np.float32]:
    """(n, c) probabilities of logistic regression on vectors (n, d), cross-validated.

    A group of near copies is held out together, and counts once together. strength: the inverse of
    the penalty (scikit-learn's C) on standardised vectors. Rows of items that are not judged are
    NaN.
    """
    require_whole("folds", folds, 2)
    given, known = np.asarray(labels, np.int64), np.asarray(classes, np.int64)
    place, judged = _places(given, known)
    rows = np.flatnonzero(judged)
    made = np.full((len(given), len(known)), np.nan, np.float32)
    if len(known) == 1:
        made[rows] = 1
    if len(known) < 2:
        return made
    held = np.arange(len(given)) if groups is None else np.asarray(groups)
    fold = _folds(place[rows], held[rows], folds, seed)
    wide = vectors[rows] - vectors[rows].mean(0)
    wide /= max(float(wide.std()), 1e-12)
    copies = np.unique(held[rows], return_inverse=True, return_counts=True)
    shares = 1 / copies[2][copies[1]]
    made[rows] = _cross_validated(wide, place[rows], fold, shares, len(known), folds, strength)
    return made


def _in_row(values: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, k) how often each value occurs in its row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    starts = np.ones(values.shape, bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = np.cumsum(starts.ravel()) - 1
    counts = np.bincount(run)[run].reshape(values.shape).astype(np.float64)
    made: NDArray[np.float64] = np.empty_like(counts)
    np.put_along_axis(made, order, counts, 1)
    return made


def _cross_validated(
    wide: NDArray[np.float32],
    place: NDArray[np.int64],
    fold: NDArray[np.int64],
    shares: NDArray[np.float64],
    classes: int,
    folds: int,
    strength: float,
) -> NDArray[np.float32]:
    """(n, classes); NaN for items of a class that only their own part has."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise _missing("scikit-learn") from error
    made = np.zeros((len(place), classes), np.float32)
    for at in range(folds):
        out = fold == at
        if not out.any():
            continue
        model = LogisticRegression(C=strength, max_iter=200, tol=1e-3)
        if len(np.unique(place[~out])) < 2:
            raise RequestError(
                "cross-validation leaves one class only in a part; use fewer folds, or judge "
                "labels by neighbours"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fit that stops at its last iteration is as good
            model.fit(wide[~out], place[~out], sample_weight=shares[~out])
        made[np.ix_(out, model.classes_)] = model.predict_proba(wide[out])
        made[out & ~np.isin(place, model.classes_)] = np.nan
    return made


def _folds(
    place: NDArray[np.int64], groups: NDArray[Any], folds: int, seed: int
) -> NDArray[np.int64]:
    """(n,) each item's part: groups whole, classes even, drawn by ``seed``."""
    drawn = np.random.Generator(np.random.Philox(seed))
    _, first, member = np.unique(groups, return_index=True, return_inverse=True)
    # the class of a group is that of its first item; within a class the parts go round
    of_class = place[first]
    order = np.lexsort((drawn.random(len(first)), of_class))
    part = np.empty(len(first), np.int64)
    part[order] = np.arange(len(first)) % folds
    made: NDArray[np.int64] = part[member]
    return made


def _found(place: NDArray[np.int64], held: NDArray[np.float64], rule: str) -> NDArray[np.bool_]:
    present = np.unique(place)
    if len(present) < 2:
        return np.zeros(len(place), bool)
    try:
        from cleanlab.filter import find_label_issues
    except ModuleNotFoundError as error:
        raise _missing("cleanlab") from error
    # it wants each class to occur; one that no item has any more is left out
    among = held[:, present]
    total = among.sum(1, keepdims=True)
    among = np.where(total > 0, among / np.where(total > 0, total, 1), 1 / len(present))
    again = np.searchsorted(present, place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: NDArray[np.bool_] = find_label_issues(again, among, filter_by=rule, n_jobs=1)
    return found


def _places(
    labels: NDArray[np.int64], classes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(position of each label among ``classes``, 0 where it is none; whether it is one)."""
    if not len(classes):
        return np.zeros(len(labels), np.int64), np.zeros(len(labels), bool)
    place = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    judged = classes[place] == labels
    return np.where(judged, place, 0), judged


def _missing(package: str) -> RequestError:
    return RequestError(
        f'judging labels needs the package "{package}", which is not installed; '
        'run: pip install "sparing[pool]"'
    )
