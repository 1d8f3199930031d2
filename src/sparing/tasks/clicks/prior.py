"""Smoothed target rates as a number that a network gets, so that it begins where counting ends.

Rates that a row's own label went into would be trusted too much: training rows get those of counts
that were made without their fold, one of ``FOLDS`` drawn by lot.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.tasks.clicks.encoded import Encoded
from sparing.tasks.clicks.rates import Additive, Paired, additive, paired
from sparing.tasks.clicks.reference import fitted

FOLDS: Final = 5
Rates = Additive | Paired


def fit(train: Encoded, sizes: tuple[int, ...]) -> Rates:
    """The rates that ``reference`` measures, of pairs if there are any.

    Raises RequestError for rows of one class.
    """
    found = fitted(train, sizes)
    if not found:
        raise RequestError(
            "rates=True needs training rows of both classes, and all of these are of one; leave "
            "it out"
        )
    return list(found.values())[-1]


def out_of_fold(train: Encoded, sizes: tuple[int, ...], rates: Rates) -> NDArray[np.float64]:
    """The log-odds of each training row by counts of the other folds' rows, (N,)."""
    fold = np.random.default_rng(0).integers(FOLDS, size=len(train))
    found = np.empty(len(train))
    for number in range(FOLDS):
        asked = fold == number
        if asked.any():
            others = train.ids[~asked], train.labels[~asked]
            found[asked] = _again(rates, *others, sizes).log_odds(train.ids[asked])
    return found


def beside(data: Encoded, log_odds: NDArray[np.float64]) -> Encoded:
    """The same rows with one number more, (N, D + 1)."""
    column = log_odds[:, None].astype(np.float32)
    return dataclasses.replace(data, numeric=np.concatenate([data.numeric, column], axis=1))


def _again(rates: Rates, ids: Any, labels: Any, sizes: tuple[int, ...]) -> Rates:
    """The same fields and strengths, counted on other rows."""
    below = rates.below if isinstance(rates, Paired) else rates
    if not 0 < int(labels.sum(dtype=np.int64)) < len(labels):
        raise RequestError(
            f"rates=True leaves out a fifth of the training rows, and the other {len(labels):,} "
            "are of one class; leave it out"
        )
    counted = additive(ids, labels, sizes, below.fields, below.strength)
    if isinstance(rates, Additive):
        return counted
    return paired(ids, labels, sizes, counted, rates.pair, rates.strength)


def save(path: Path, rates: Rates) -> None:
    """Write them as one npz file."""
    below = rates.below if isinstance(rates, Paired) else rates
    arrays: dict[str, Any] = {
        "base": below.base,
        "fields": np.array(below.fields, dtype=np.int64),
        "strength": below.strength,
        **{f"moves.{number}": moves for number, moves in enumerate(below.moves)},
    }
    if isinstance(rates, Paired):
        arrays |= {
            "pair": np.array(rates.pair),
            "size": rates.size,
            "keys": rates.keys,
            "rows": rates.rows,
            "positives": rates.positives,
            "pair_strength": rates.strength,
        }
    np.savez(path, **arrays)


def load(path: Path) -> Rates:
    """What ``save`` wrote. OSError, ValueError and KeyError where it is missing or damaged."""
    with np.load(path, allow_pickle=False) as held:
        fields = tuple(held["fields"].tolist())
        moves = tuple(held[f"moves.{number}"] for number in range(len(fields)))
        below = Additive(float(held["base"]), fields, moves, float(held["strength"]))
        if "pair" not in held:
            return below
        first, second = held["pair"].tolist()
        return Paired(
            below,
            (first, second),
            int(held["size"]),
            held["keys"],
            held["rows"],
            held["positives"],
            float(held["pair_strength"]),
        )
