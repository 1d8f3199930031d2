"""Area under the ROC curve: exact, by group, with DeLong's intervals. Scores need no scale.

Everywhere ``scores``: (N,), higher for rows that are likelier positive; ``labels``: (N,) of 0 and
1. A pair of a positive and a negative row counts 1 if the positive one has the higher score and
1/2 if they tie; the AUC is the mean over all pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparing.core.checks import require_number
from sparing.core.errors import RequestError


@final
class UndefinedError(RequestError):
    """Labels of one class only, or none: there are no pairs to rank, and the AUC is undefined."""


def checked(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores as float64 and labels as bool, on the CPU.

    Raises RequestError for shapes that do not fit, NaN among the scores, and labels that are
    neither 0 nor 1.
    """
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise RequestError(
            f"scores and labels must be (N,), got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    scores, labels = scores.detach().cpu().double(), labels.detach().cpu()
    nan = scores.isnan()
    if nan.any():
        raise RequestError(f"the score of row {int(nan.nonzero()[0])} is NaN; it has no rank")
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise RequestError(f"labels must be 0 or 1, row {row} has {labels[row].item()}")
    return scores, labels.bool()


def _both(labels: Tensor) -> tuple[int, int]:
    """How many positives and negatives; UndefinedError without both."""
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        raise UndefinedError(
            f"the AUC of {positive} positive and {negative} negative rows is undefined: it needs "
            "some of both"
        )
    return positive, negative


def auc(scores: Tensor, labels: Tensor) -> float:
    """The exact AUC in [0, 1]: whole numbers are counted, ties halve.

    Raises UndefinedError for labels of one class, RequestError as ``checked``.
    """
    scores, labels = checked(scores, labels)
    positive, negative = _both(labels)
    above, below, _ = _counts(scores, labels)
    earlier = below.cumsum(0) - below
    return int((above * (2 * earlier + below)).sum()) / (2 * positive * negative)


def _counts(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positives and negatives of each distinct score in rising order; each row's place therein."""
    distinct, place = torch.unique(scores, return_inverse=True)
    above = torch.bincount(place[labels], minlength=len(distinct))
    below = torch.bincount(place[~labels], minlength=len(distinct))
    return above, below, place


def placements(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each positive's share of negatives below it, (P,), each negative's of positives above, (M,).

    Float64, rows in their order; the mean of either is the AUC. Errors as for ``auc``.
    """
    scores, labels = checked(scores, labels)
    positive, negative = _both(labels)
    above, below, place = _counts(scores, labels)
    above, below = above.double(), below.double()  # half of a whole number is float32 otherwise
    under = (below.cumsum(0) - 0.5 * below) / negative
    over = (positive - above.cumsum(0) + 0.5 * above) / positive
    return under[place[labels]], over[place[~labels]]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate, its standard error, and the ends of its interval of confidence ``level``."""

    estimate: float
    error: float
    low: float
    high: float
    level: float


def delong(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The AUCs of S scorings of the same rows, (S,), and their covariance, (S, S), float64.

    ``scores``: (S, N). DeLong, DeLong and Clarke-Pearson 1988 (Biometrics 44), eq. 5 to 7: the
    covariance of placements of positives over their number, and the same of negatives. Rows count
    as independent draws. Needs two rows of each class; errors as for ``auc``.
    """
    if scores.ndim != 2 or not len(scores):
        raise RequestError(f"scores must be (scorings, N), got {tuple(scores.shape)}")
    found = [placements(each, labels) for each in scores]
    under, over = (torch.stack(parts) for parts in zip(*found, strict=True))
    if under.shape[1] < 2 or over.shape[1] < 2:
        raise UndefinedError("an interval of the AUC needs two positive and two negative rows")
    spread = torch.cov(under) / under.shape[1] + torch.cov(over) / over.shape[1]
    return under.mean(1), spread.reshape(len(scores), len(scores))


def auc_interval(scores: Tensor, labels: Tensor, level: float = 0.95) -> Interval:
    """The AUC with DeLong's interval, cut to [0, 1]. Errors as for ``delong``."""
    values, spread = delong(scores.unsqueeze(0), labels)
    found = _normal(float(values[0]), float(spread[0, 0]), level)
    return Interval(
        estimate=found.estimate,
        error=found.error,
        low=max(found.low, 0.0),
        high=min(found.high, 1.0),
        level=level,
    )


def auc_difference(scores: Tensor, others: Tensor, labels: Tensor, level: float = 0.95) -> Interval:
    """How much higher the AUC of ``scores`` is than that of ``others`` on the same rows, paired."""
    values, spread = delong(torch.stack([scores, others]), labels)
    variance = float(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])
    return _normal(float(values[0] - values[1]), variance, level)


def _normal(estimate: float, variance: float, level: float) -> Interval:
    require_number("level", level, 0, 1)
    error = math.sqrt(max(variance, 0.0))
    quantile = float(torch.special.ndtri(torch.tensor(0.5 + level / 2, dtype=torch.float64)))
    reach = quantile * error if error else 0.0
    return Interval(
        estimate=estimate, error=error, low=estimate - reach, high=estimate + reach, level=level
    )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ByGroup:
    """By group (G,): its number, AUC (NaN where it has one class), rows and positives."""

    group: Tensor
    auc: Tensor
    rows: Tensor
    positives: Tensor

    @property
    def mean(self) -> float:
        """The groups' mean AUC weighted by rows (Zhu et al. 2017, GAUC); NaN if none has one."""
        known = ~self.auc.isnan()
        weight = self.rows[known].double()
        return float((self.auc[known] * weight).sum() / weight.sum())


def auc_by_group(scores: Tensor, labels: Tensor, groups: Tensor) -> ByGroup:
    """The exact AUC within each group, ``groups``: (N,) whole numbers. Errors as ``checked``."""
    scores, labels = checked(scores, labels)
    if groups.shape != labels.shape or groups.is_floating_point():
        raise RequestError(
            f"groups must be whole numbers, {tuple(labels.shape)}, got {groups.dtype} "
            f"{tuple(groups.shape)}"
        )
    names, whose = torch.unique(groups.cpu(), return_inverse=True)
    rank = torch.unique(scores, return_inverse=True)[1]
    # one key for each group and score, in the order of group, then score
    keys, place = torch.unique(whose * (len(scores) + 1) + rank, return_inverse=True)
    of = keys // (len(scores) + 1)
    above = torch.bincount(place[labels], minlength=len(keys))
    below = torch.bincount(place[~labels], minlength=len(keys))
    size = len(names)
    positive = torch.bincount(whose[labels], minlength=size)
    negative = torch.bincount(whose[~labels], minlength=size)
    before = negative.cumsum(0) - negative  # negatives of the groups before
    earlier = below.cumsum(0) - below - before[of]
    pairs = torch.zeros(size, dtype=torch.int64).index_add_(0, of, above * (2 * earlier + below))
    # no pairs: 0 / 0 is NaN, which is what such a group has
    found = pairs.double() / (2 * positive * negative).double()
    return ByGroup(group=names, auc=found, rows=positive + negative, positives=positive)
