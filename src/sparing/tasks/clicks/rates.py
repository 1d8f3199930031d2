"""Smoothed target rates: how often the rows of each value were positive, as a model.

No network, a pass over the rows; what a trained model must beat. Ids (N, F) whole numbers, labels
(N,) of 0 and 1, as numpy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number
from sparing.core.errors import RequestError

Floats = NDArray[np.float64]
Ids = NDArray[Any]


def smoothed(positives: Any, rows: Any, prior: Any, strength: float) -> Any:
    """The rate with ``strength`` imagined rows of the rate ``prior``: (n + s p) / (N + s).

    The posterior mean of a rate whose prior is a beta distribution with that mean and weight.
    """
    return (positives + strength * prior) / (rows + strength)


def log_odds(rate: Any) -> Any:
    """Of a rate in (0, 1)."""
    return np.log(rate) - np.log1p(-rate)


@final
@dataclass(frozen=True, slots=True)
class Additive:
    """Log-odds of the base rate, plus what each value of ``fields`` moves them by.

    ``moves[k]``: (size of field k,) float64, the smoothed rate's log-odds less the base rate's; 0
    for a value that did not occur. ``strength`` of the smoothing. Fields that say the same twice
    count twice: choose them.
    """

    base: float
    fields: tuple[int, ...]
    moves: tuple[Floats, ...]
    strength: float = 20.0

    def log_odds(self, ids: Ids) -> Floats:
        """(N, F) -> (N,) float64."""
        found = np.full(len(ids), log_odds(self.base))
        for field, moves in zip(self.fields, self.moves, strict=True):
            found += moves[ids[:, field]]
        return found


def additive(
    ids: Ids, labels: Ids, sizes: tuple[int, ...], fields: tuple[int, ...], strength: float = 20.0
) -> Additive:
    """Count the rows of each value of ``fields``, positions in ``sizes``.

    Raises RequestError without positives or negatives, and for a strength that is not above 0.
    """
    require_number("strength", strength, 0)
    positive = float(labels.sum(dtype=np.float64))
    if not 0 < positive < len(labels) or not strength:
        raise RequestError(
            "target rates need rows of both classes and a strength above 0, got "
            f"{positive:.0f} positives of {len(labels)} rows and strength {strength}"
        )
    base = positive / len(labels)
    moves = []
    for field in fields:
        rows = np.bincount(ids[:, field], minlength=sizes[field]).astype(np.float64)
        hits = np.bincount(ids[labels > 0, field], minlength=sizes[field]).astype(np.float64)
        rate = smoothed(hits, rows, base, strength)
        moves.append(np.where(rows > 0, log_odds(rate) - log_odds(base), 0.0))
    return Additive(base, fields, tuple(moves), strength)


@final
@dataclass(frozen=True, slots=True)
class Paired:
    """Rates of the pairs of values of two fields, smoothed towards what ``below`` says of a row.

    ``keys``: (P,) of the pairs that occurred, rising, with their rows and positives.
    """

    below: Additive
    pair: tuple[int, int]
    size: int
    keys: NDArray[np.int64]
    rows: Floats
    positives: Floats
    strength: float

    def log_odds(self, ids: Ids) -> Floats:
        """(N, F) -> (N,) float64."""
        key = _key(ids, self.pair, self.size)
        place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        known = self.keys[place] == key
        prior = 1 / (1 + np.exp(-self.below.log_odds(ids)))
        rate = smoothed(
            self.positives[place] * known, self.rows[place] * known, prior, self.strength
        )
        found: Floats = log_odds(rate)
        return found


def paired(
    ids: Ids,
    labels: Ids,
    sizes: tuple[int, ...],
    below: Additive,
    pair: tuple[int, int],
    strength: float = 20.0,
) -> Paired:
    """Count the rows of each pair of values of the fields ``pair``."""
    keys, place = np.unique(_key(ids, pair, sizes[pair[1]]), return_inverse=True)
    rows = np.bincount(place, minlength=len(keys)).astype(np.float64)
    hits = np.bincount(place[labels > 0], minlength=len(keys)).astype(np.float64)
    return Paired(below, pair, sizes[pair[1]], keys, rows, hits, strength)


def _key(ids: Ids, pair: tuple[int, int], size: int) -> NDArray[np.int64]:
    found: NDArray[np.int64] = ids[:, pair[0]].astype(np.int64) * size + ids[:, pair[1]]
    return found


def chosen(
    ids: Ids,
    labels: Ids,
    held_ids: Ids,
    held_labels: Ids,
    sizes: tuple[int, ...],
    strength: float = 20.0,
) -> tuple[int, ...]:
    """Fields for ``additive``, greedily: the next one lowers the log loss of held-out rows most.

    Stops when none does; never none at all.
    """
    whole = additive(ids, labels, sizes, tuple(range(len(sizes))), strength)
    current = Additive(whole.base, (), ()).log_odds(held_ids)
    taken: list[int] = []
    best = np.inf
    while len(taken) < len(sizes):
        losses = {
            field: _log_loss(current + whole.moves[field][held_ids[:, field]], held_labels)
            for field in range(len(sizes))
            if field not in taken
        }
        field = min(losses, key=lambda number: losses[number])
        if losses[field] >= best:
            break
        best = losses[field]
        taken.append(field)
        current = current + whole.moves[field][held_ids[:, field]]
    return tuple(taken)


def _log_loss(values: Floats, labels: Ids) -> float:
    return float(np.mean(np.logaddexp(0.0, values) - values * labels))
