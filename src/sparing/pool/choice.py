"""Choosing in proportion to gain, without replacement, with the chance that each one had.

Exponential keys: an exponential variable divided by the weight; the n smallest are a draw without
replacement, each in proportion to the weights that are left (Efraimidis and Spirakis 2006). Given
the first key left out, t, an item was chosen with probability 1 - exp(-w t), and the sum of values
over these probabilities is unbiased for the sum over all items (Horvitz and Thompson 1952;
conditioning on the rank: Cohen and Kaplan 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.pool.gain import Floats

Random = np.random.Generator
FLOOR: Final = 1e-6
"""Share of its weight that an item keeps, however many of its copies were chosen: else fewer could
be chosen than there are."""


@final
@dataclass(frozen=True, slots=True)
class Chosen:
    """places: (n,) int64; chance: (n,) float64, the probability that each had in its round, given
    the rounds before; weight: (n,) float64, how many items each stands for in an estimate.

    In one round the places ascend and the weights are 1 / chance.
    """

    places: NDArray[np.int64]
    chance: NDArray[np.float64]
    weight: NDArray[np.float64]

    def total(self, values: Floats) -> float:
        """Estimate of the sum over all items from the values (n,) of the chosen: unbiased.

        Items of weight 0 cannot be chosen and count as 0.
        """
        if values.shape != self.places.shape:
            raise RequestError(f"{self.places.size} were chosen, got values {values.shape}")
        return float((values * self.weight).sum(dtype=np.float64))

    def mean(self, values: Floats, size: int | None = None) -> float:
        """Estimate of the mean over all items: unbiased with their number, ``size``.

        Without it the ratio of two estimates (Hájek 1971), nearly unbiased and often closer.
        """
        if size is None:
            return self.total(values) / self.total(np.ones(values.shape))
        return self.total(values) / size


def generator(seed: int, draw: int = 0) -> Random:
    """The generator of the draw of that number."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, draw))))


def choose(weights: Floats, n: int, random: Random) -> Chosen:
    """Choose n of N in proportion to weights (N,); NaN and 0 are never chosen. O(N).

    Raises RequestError for weights below 0 or infinite, and for fewer than n above 0.
    """
    if weights.ndim != 1:
        raise RequestError(f"weights must be a vector, got shape {tuple(weights.shape)}")
    require_whole("n", n, 0)
    keys = random.standard_exponential(weights.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        keys /= weights
    return smallest(keys, weights, n)


def smallest(keys: NDArray[np.float64], weights: Floats, n: int) -> Chosen:
    """The n smallest of keys (N,), which are exponential variables over weights (N,)."""
    # the maximum and minimum skip no NaN, and fmin, fmax do: one pass each tells bad weights
    least, most = (np.fmin.reduce(weights), np.fmax.reduce(weights)) if weights.size else (0, 0)
    if least < 0 or most == np.inf:
        raise RequestError("weights must be finite and not negative")
    if n == 0:
        return Chosen(np.empty(0, np.int64), np.empty(0), np.empty(0))
    if n < keys.size:  # NaN is sorted last, as +inf is
        order = np.argpartition(keys, n)
        picked, border = np.sort(order[:n]), float(keys[order[n]])
    else:
        picked, border = np.arange(keys.size), np.inf
    if n > keys.size or not np.isfinite(keys[picked]).all():
        able = int((weights > 0).sum())
        raise RequestError(f"cannot choose {n}: {able} of {weights.size} weigh more than 0")
    if not np.isfinite(border):
        return Chosen(picked, np.ones(n), np.ones(n))
    chance: Any = -np.expm1(-weights[picked].astype(np.float64) * border)
    return Chosen(picked, chance, 1 / chance)


def in_rounds(
    weights: Floats,
    n: int,
    random: Random,
    rounds: int,
    discount_: Callable[[Floats, NDArray[np.int64]], object],
) -> Chosen:
    """Choose n in rounds, after each of which ``discount_(weights, places)`` changes the weights.

    Each round estimates the sum without bias: what was chosen before it is known, and the rest is
    told by its own draw (Des Raj 1956). A chosen one's weight is its share in the rounds' mean.
    """
    require_whole("rounds", rounds, 1)
    require_whole("n", n, 0)
    able = int((weights > 0).sum())
    if n > able:
        raise RequestError(f"cannot choose {n}: {able} of {weights.size} weigh more than 0")
    left = np.array(weights)
    least = left * left.dtype.type(FLOOR)
    parts = []
    for number in range(rounds):
        count = n * (number + 1) // rounds - n * number // rounds
        part = choose(left, count, random)
        parts.append(part)
        left[part.places] = np.nan
        if number + 1 < rounds:
            discount_(left, part.places)
            np.maximum(left, least, out=left)
            left[part.places] = np.nan
    used = sum(part.places.size > 0 for part in parts)
    later = used
    weight = []
    for part in parts:
        later -= part.places.size > 0
        weight.append((later + part.weight) / max(used, 1))
    return Chosen(
        np.concatenate([part.places for part in parts]),
        np.concatenate([part.chance for part in parts]),
        np.concatenate(weight),
    )
