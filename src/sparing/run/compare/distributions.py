"""The few distribution functions that the statistics need, from scipy, imported at first use."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparing.core.errors import RequestError

Floats: TypeAlias = NDArray[np.float64]


@cache
def _special() -> Any:
    try:
        from scipy import special
    except ImportError:
        raise RequestError(
            'comparisons need scipy, which is not installed; install "sparing[compare]" or scipy'
        ) from None
    return special


def t_below(t: ArrayLike, df: ArrayLike) -> Floats:
    """P(T <= t) for Student's t with ``df`` degrees of freedom; elementwise, infinities allowed."""
    return np.asarray(_special().stdtr(df, t), dtype=np.float64)


def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, by the lower tail, which keeps its digits for p near 1."""
    tail = float(_special().stdtrit(df, min(p, 1.0 - p)))
    return tail if p < 0.5 else -tail


def normal_below(z: ArrayLike) -> Floats:
    """P(Z <= z) for a standard normal Z, elementwise."""
    return np.asarray(_special().ndtr(z), dtype=np.float64)


def normal_quantile(p: float) -> float:
    """The z with P(Z <= z) = p."""
    return float(_special().ndtri(p))


def spread_range(df: int, tail: float) -> tuple[float, float]:
    """Between which s / sigma, for s the sample deviation, lies but for ``tail`` on either side."""
    special = _special()
    low = 2.0 * float(special.gammaincinv(df / 2.0, tail))
    high = 2.0 * float(special.gammainccinv(df / 2.0, tail))
    return math.sqrt(low / df), math.sqrt(high / df)


def spread_density(s: Floats, df: int) -> Floats:
    """The density of s / sigma, a chi variable with ``df`` degrees of freedom over sqrt(df)."""
    half = df / 2.0
    constant = half * math.log(half) - float(_special().gammaln(half)) + math.log(2.0)
    return np.asarray(np.exp(constant + (df - 1) * np.log(s) - half * s * s))
