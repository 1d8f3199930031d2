"""How often the tests decide: exact power of the paired tests, and the seeds that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from sparing.core.errors import RequestError
from sparing.run.compare.distributions import (
    normal_below,
    spread_density,
    spread_range,
    t_quantile,
)
from sparing.run.compare.margin import Margin

MOST_SEEDS = 10_000
"""Where the search for a number of seeds ends."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
_TAIL = 1e-14
_REACH = 9.0
"""Standard deviations beyond which a normal distribution has nothing left in float64."""


def equivalence_power(
    n: int, *, sd: float, low: float, high: float, alpha: float, difference: float = 0.0
) -> float:
    """The chance that both one-sided paired t tests reject at ``alpha`` with ``n`` seeds.

    ``sd`` is the standard deviation of the paired differences, ``difference`` their true mean,
    (``low``, ``high``) the margin in the same units, infinite where unbounded. Exact for normal
    differences: the bivariate noncentral t probability, integrated over the sample deviation.
    Source: Owen 1965 (Biometrika 52); Phillips 1990 (J. Pharmacokinet. Biopharm. 18).
    """
    if sd == 0.0:
        return float(low < difference < high)
    scale = math.sqrt(n) / sd
    return _both(n - 1, (difference - low) * scale, (high - difference) * scale, alpha)


def difference_power(n: int, *, sd: float, alpha: float, difference: float) -> float:
    """The chance that the two-sided paired t test of no difference rejects at ``alpha``.

    Exact for normal differences (noncentral t, both tails).
    """
    if sd == 0.0:
        return float(difference != 0.0)
    effect = difference * math.sqrt(n) / sd
    above = _both(n - 1, effect, math.inf, alpha / 2.0)
    return above + _both(n - 1, math.inf, -effect, alpha / 2.0)


def _both(df: int, above: float, below: float, alpha: float) -> float:
    """P(t s - above < Z < below - t s): Z normal, s a sample deviation, t the critical value.

    ``above`` and ``below`` are the distances of the true mean from the two sides in standard
    errors. The integrand over s is smooth but steep where a side comes near, so panels of
    Gauss-Legendre nodes begin and end around there.
    """
    critical = -t_quantile(alpha, df)
    first, last = spread_range(df, _TAIL)
    last = min(last, (above + below) / (2.0 * critical))
    if last <= first:
        return 0.0
    cuts = {first, last}
    for side in (above, below):
        if math.isfinite(side):
            cuts.update((side + reach) / critical for reach in (-_REACH, 0.0, _REACH))
    ends = np.array(sorted(cut for cut in cuts if first <= cut <= last))
    half = np.diff(ends)[:, None] / 2.0  # (panels, 1)
    s = ends[:-1, None] + half * (1.0 + _NODES)  # (panels, nodes)
    inside = normal_below(below - critical * s) - normal_below(critical * s - above)
    mass = np.sum(half * _WEIGHTS * np.maximum(inside, 0.0) * spread_density(s, df))
    return float(min(max(mass, 0.0), 1.0))


def seeds_needed(
    sd: float,
    margin: Margin | float | tuple[float, float],
    alpha: float,
    power: float,
    difference: float = 0.0,
) -> int | None:
    """The fewest seeds, from 2, with which equivalence is found with probability ``power``.

    ``sd`` is the standard deviation of the paired differences and ``difference`` their assumed
    true mean. ``margin`` is a half width, a pair (low, high) with infinities where unbounded, or
    a ``Margin`` that is not relative. None if ``MOST_SEEDS`` are too few, as they are where the
    true difference is not inside the margin. The power is exact, see ``equivalence_power``; the
    normal formula asks for too few seeds when they are few.

    Raises:
        RequestError: a relative margin, or a number out of range.
    """
    low, high = _sides(margin)
    if not 0.0 <= sd < math.inf:
        raise RequestError(f"sd must be a finite number, zero or above, got {sd}")
    if not math.isfinite(difference):
        raise RequestError(f"difference must be a finite number, got {difference}")
    if not 0.0 < alpha < 0.5:
        raise RequestError(f"alpha must lie between 0 and 0.5, got {alpha}")
    if not alpha < power < 1.0:
        raise RequestError(f"power must lie between alpha and 1, got {power}")
    if not low < difference < high:
        return None
    return _fewest(
        lambda n: equivalence_power(
            n, sd=sd, low=low, high=high, alpha=alpha, difference=difference
        ),
        power,
    )


def seeds_to_decide(
    *, sd: float, low: float, high: float, alpha: float, power: float, difference: float
) -> int | None:
    """The fewest seeds with which either verdict is found with probability ``power``.

    "equivalent" or "different", whichever takes fewer, if ``difference`` and ``sd`` are the true
    mean and standard deviation of the paired differences. None if ``MOST_SEEDS`` are too few.
    """
    found = (
        seeds_needed(sd, (low, high), alpha, power, difference),
        _fewest(lambda n: difference_power(n, sd=sd, alpha=alpha, difference=difference), power),
    )
    return min((n for n in found if n is not None), default=None)


def _sides(margin: Margin | float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(margin, Margin):
        if margin.relative:
            raise RequestError(
                f"the margin {margin} is relative; give margin.bounds(mean of the baseline)"
            )
        return margin.bounds(math.nan)
    low, high = margin if isinstance(margin, tuple) else (-margin, margin)
    if not low < 0.0 < high:
        raise RequestError(f"the margin must reach to both sides of zero, got {low} to {high}")
    return low, high


def _fewest(chance: Callable[[int], float], power: float) -> int | None:
    """The least n in [2, MOST_SEEDS] with ``chance(n) >= power``, for a chance that grows."""
    high = 2
    while chance(high) < power:
        if high == MOST_SEEDS:
            return None
        high = min(2 * high, MOST_SEEDS)
    low = high // 2  # too few, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    return high
