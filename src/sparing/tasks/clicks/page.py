"""What the report page shows of held-out rows: calibration, and the AUC over time."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from sparing.tasks.clicks.auc import UndefinedError, auc_by_group, auc_interval
from sparing.tasks.clicks.calibration import calibration

MOST_TIMES: Final = 12
"""More than these are not a table that one reads."""


def tables(log_odds: Tensor, labels: Tensor, time: np.ndarray, name: str | None) -> list[Any]:
    """Tables of held-out rows; ``name``: what the time column is called, None without one."""
    found = [_calibration(log_odds, labels)]
    if name is not None and 1 < len(np.unique(time)) <= MOST_TIMES:
        # a copy: what is mapped from a file cannot be written, which torch warns of
        found.append(_by_time(log_odds, labels, torch.from_numpy(np.array(time)), name))
    return found


def _calibration(log_odds: Tensor, labels: Tensor) -> dict[str, Any]:
    by = calibration(log_odds, labels)
    rows = [
        [f"{count:,}", f"{100 * said:.2f} %", f"{100 * true:.2f} %"]
        for count, said, true in zip(
            by.rows.tolist(), by.predicted.tolist(), by.observed.tolist(), strict=True
        )
    ]
    return {
        "title": "Predicted and observed rates",
        "about": (
            "Held-out rows by their prediction, in groups of about as many rows each. All in all "
            f"{by.ratio:.3f} positives are predicted for each one observed; the two rates are "
            f"{100 * by.error:.3f} points apart, the mean over rows."
        ),
        "head": ["rows", "predicted", "observed"],
        "rows": rows,
    }


def _by_time(log_odds: Tensor, labels: Tensor, time: Tensor, name: str) -> dict[str, Any]:
    by = auc_by_group(log_odds, labels, time)
    rows = []
    for when, count, positives in zip(
        by.group.tolist(), by.rows.tolist(), by.positives.tolist(), strict=True
    ):
        mine = time == when
        try:
            one = auc_interval(log_odds[mine], labels[mine])
            told = f"{100 * one.estimate:.2f}", f"{100 * one.low:.2f} to {100 * one.high:.2f}"
        except UndefinedError:
            told = "undefined", ""
        rows.append([f"{when:,}", f"{count:,}", f"{positives:,}", *told])
    return {
        "title": f"AUC by {name}",
        "about": (
            "Within each, in percent, with DeLong's 95 % interval, for which rows are "
            f"independent. The mean, weighted by rows, is {100 * by.mean:.2f}."
        ),
        "head": [name, "rows", "positives", "AUC", "interval"],
        "rows": rows,
    }
