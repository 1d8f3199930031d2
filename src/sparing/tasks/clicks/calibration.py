"""Whether probabilities are right: log loss, and predicted against observed rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.tasks.clicks.auc import checked


def log_loss(log_odds: Tensor, labels: Tensor) -> float:
    """The mean binary cross entropy in nats, from log-odds (N,); none is too far out for it.

    Raises RequestError as ``checked``, and without rows.
    """
    log_odds, labels = checked(log_odds, labels)
    if not len(labels):
        raise RequestError("there are no rows to take the log loss of")
    each = F.binary_cross_entropy_with_logits(log_odds, labels.double(), reduction="none")
    return float(each.mean())


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Predicted and observed rates: of all rows, and by bin (b,) of the predictions in order.

    ``ratio``: predicted over observed positives of all rows, infinite without any observed.
    ``error``: the mean over rows of a bin's distance between the two rates.
    """

    rows: Tensor
    predicted: Tensor
    observed: Tensor
    ratio: float
    error: float


def calibration(log_odds: Tensor, labels: Tensor, bins: int = 10) -> Calibration:
    """Rows by their prediction in at most ``bins`` groups of about as many rows each.

    Rows of one prediction share a bin, whatever their order. Raises as ``log_loss``.
    """
    require_whole("bins", bins, 1)
    log_odds, labels = checked(log_odds, labels)
    if not len(labels):
        raise RequestError("there are no rows to compare rates of")
    _, place, counts = torch.unique(log_odds, return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - 0.5 * counts.double()  # how many rows lie below, ties halved
    whose = (middle * bins / len(labels)).long().clamp(max=bins - 1)[place]
    chance, truth = log_odds.sigmoid(), labels.double()
    rows = torch.bincount(whose, minlength=bins)
    there = rows > 0
    rows = rows[there]
    predicted = torch.bincount(whose, chance, minlength=bins)[there] / rows
    observed = torch.bincount(whose, truth, minlength=bins)[there] / rows
    return Calibration(
        rows=rows,
        predicted=predicted,
        observed=observed,
        ratio=float(chance.sum() / truth.sum()),
        error=float(((predicted - observed).abs() * rows).sum() / len(labels)),
    )
