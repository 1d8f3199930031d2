"""Which items stay under a budget of size, so that what was covered stays covered.

The gain that all orders of arrival share alike tells an item's chance to stay; those that stay
lower the gain of their near ones. Each item has an exponential variable of its own for ever, told
by its id: were it drawn anew for each eviction, items that came early would have to be lucky more
often than items that came late.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_whole
from sparing.pool.neighbourhood import Discount, Ids, Rows

ROUNDS: Final = 8


def variables(ids: Ids, seed: int) -> NDArray[np.float64]:
    """An exponential variable for each id, always the same one: (n,) -> (n,) float64 above 0.

    SplitMix64 (Steele, Lea and Flood 2014) of the id, started by the seed.
    """
    word = ids.astype(np.uint64)
    with np.errstate(over="ignore"):
        start = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        word = (word + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + start
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
        word ^= word >> np.uint64(31)
    uniform = ((word >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    drawn: NDArray[np.float64] = -np.log(uniform)
    return drawn


class Valued(Protocol):
    """Items by place, with gains that picked items lower: a ``Neighbourhood``, or ``Members``."""

    @property
    def ids(self) -> Ids: ...

    def discounting(self) -> tuple[Rows, Discount]: ...


def staying(items: Valued, budget: int, seed: int, rounds: int = ROUNDS) -> NDArray[np.bool_]:
    """Which places stay when ``budget`` items may: (N,) bool.

    In each round those with the smallest variable over gain stay, and discount the others.
    """
    require_whole("budget", budget, 0)
    require_whole("rounds", rounds, 1)
    gains, discount_ = items.discounting()
    here = ~np.isnan(gains)
    if budget >= int(here.sum()):
        return here
    drawn = variables(items.ids, seed)
    stays = np.zeros(gains.size, bool)
    for number in range(rounds):
        take = budget * (number + 1) // rounds - budget * number // rounds
        if take:
            # an item of gain 0 comes behind all others; among such the variable decides
            keys = drawn / np.maximum(gains, np.finfo(np.float32).tiny)
            keys[~here | stays] = np.inf
            picked = np.argpartition(keys, take - 1)[:take]
            stays[picked] = True
            discount_(gains, picked)
    return stays
