"""Confidence intervals of a difference by Student's t, and the tests that belong to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparing.run.compare.distributions import Floats, t_below, t_quantile

Truths: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate of a difference with its confidence interval, in units of the metric."""

    estimate: float
    low: float
    high: float
    level: float
    method: str


@dataclass(frozen=True, kw_only=True)
class PairedTests:
    """Tests on paired differences; arrays (...) over experiments.

    ``p_low`` is of the hypothesis that the difference is at most the margin's low side,
    ``p_high`` that it is at least the high side, ``p_difference`` (two-sided) that it is zero.
    An unbounded side has p = 0.
    """

    mean: Floats
    error: Floats
    p_low: Floats
    p_high: Floats
    p_difference: Floats

    def equivalent(self, alpha: float) -> Truths:
        """Where the verdict is "equivalent": both one-sided tests reject at ``alpha``."""
        return np.asarray((self.p_low <= alpha) & (self.p_high <= alpha))

    def different(self, alpha: float) -> Truths:
        """Where the verdict is "different": a difference at ``alpha``, and not equivalent."""
        return np.asarray((self.p_difference <= alpha) & ~self.equivalent(alpha))


def paired_tests(
    differences: Floats, low: float, high: float, *, rounding: float = 0.0
) -> PairedTests:
    """Two one-sided paired t tests and the two-sided one, vectorised over leading axes.

    ``differences`` is (..., n) with n >= 2. A spread of at most ``rounding`` counts as none, so
    that differences equal but for floating point are equal. Source: Schuirmann 1987 (J.
    Pharmacokinet. Biopharm. 15), two one-sided tests; Lakens 2017 (Soc. Psychol. Personal.
    Sci. 8) on paired samples.
    """
    n = differences.shape[-1]
    mean = differences.mean(-1)
    deviation = differences.std(-1, ddof=1)
    error = np.where(deviation <= rounding, 0.0, deviation / math.sqrt(n))
    return PairedTests(
        mean=mean,
        error=error,
        p_low=t_below(-_ratio(mean - low, error, rounding), n - 1),
        p_high=t_below(-_ratio(high - mean, error, rounding), n - 1),
        p_difference=2.0 * t_below(-np.abs(_ratio(mean, error, rounding)), n - 1),
    )


def _ratio(gap: Floats, error: Floats, rounding: float) -> Floats:
    """``gap / error``, where no error gives an infinity with the sign of the gap, or 0."""
    certain = np.where(np.abs(gap) <= rounding, 0.0, np.copysign(np.inf, gap))
    certain = np.where(gap == 0.0, 0.0, certain)
    with np.errstate(over="ignore"):
        return np.divide(gap, error, out=certain, where=error > 0.0)


def paired_interval(differences: Floats, level: float, *, rounding: float = 0.0) -> Interval:
    """The t interval of the mean of ``differences`` (n,), n >= 2."""
    n = len(differences)
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    error = 0.0 if deviation <= rounding else deviation / math.sqrt(n)
    half = t_quantile(0.5 + level / 2.0, n - 1) * error
    return Interval(
        estimate=mean, low=mean - half, high=mean + half, level=level, method="paired t"
    )


def welch_interval(arm: Floats, baseline: Floats, level: float) -> Interval:
    """The interval of the difference of two means, (n,) and (m,), each at least two, unpaired.

    The variances may differ. Source: Welch 1947 (Biometrika 34), with Satterthwaite's degrees of
    freedom.
    """
    mean = float(arm.mean() - baseline.mean())
    parts = [float(x.var(ddof=1)) / len(x) for x in (arm, baseline)]
    total = sum(parts)
    half = 0.0
    if total > 0.0:
        # As shares, which cannot underflow as squares of small variances do.
        shares = [part / total for part in parts]
        df = 1.0 / sum(s * s / (len(x) - 1) for s, x in zip(shares, (arm, baseline), strict=True))
        half = t_quantile(0.5 + level / 2.0, df) * math.sqrt(total)
    return Interval(estimate=mean, low=mean - half, high=mean + half, level=level, method="Welch t")
