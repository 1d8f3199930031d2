"""Bootstrap intervals of a mean difference, over seeds and over held-out documents."""

from __future__ import annotations

import math

import numpy as np

from sparing.core.errors import RequestError
from sparing.run.compare.distributions import (
    Floats,
    normal_below,
    normal_quantile,
    t_quantile,
)
from sparing.run.compare.intervals import Interval

FEW_SEEDS = 8
"""Below this many seeds a bootstrap over seeds is rough: there are few distinct resamples."""

_CHUNK = 1 << 20
"""Numbers held at once, so that memory does not grow with resamples x documents."""


def seeds_bootstrap(
    differences: Floats, level: float, *, resamples: int, generator: np.random.Generator
) -> Interval:
    """The expanded BCa bootstrap interval of the mean of ``differences``, (n,) with n >= 2.

    A plain bootstrap over few seeds is far too narrow: resamples vary by n rather than n - 1,
    and their spread is taken for the true one. So the normal quantile is widened to Student's t
    times sqrt(n / (n - 1)). An interval still cannot leave the range of the differences.
    Sources: Efron & Tibshirani 1993, An Introduction to the Bootstrap, eq. 14.9 to 14.15;
    Hesterberg 2015 (Am. Stat. 69) on expanded percentile intervals.
    """
    n = len(differences)
    mean = float(differences.mean())
    means = np.concatenate(
        [
            differences[generator.integers(n, size=(size, n))].mean(-1)
            for size in _chunks(resamples, n)
        ]
    )
    # Resamples that tie with the estimate but for rounding must not count as below it.
    near = 1e-12 * float(np.abs(differences).max())
    below = np.count_nonzero(means < mean - near)
    tied = np.count_nonzero(np.abs(means - mean) <= near)
    share = (below + 0.5 * tied) / resamples
    bias = normal_quantile(float(np.clip(share, 0.5 / resamples, 1.0 - 0.5 / resamples)))
    centred = differences - mean
    squares = float((centred**2).sum())
    acceleration = 0.0
    if squares > near**2:
        # The jackknife's deviations are the centred values over n - 1; the factors cancel.
        acceleration = float((centred**3).sum()) / (6.0 * squares**1.5)
    reach = t_quantile(0.5 + level / 2.0, n - 1) * math.sqrt(n / (n - 1))
    ends = [_end(bias, z, acceleration) for z in (-reach, reach)]
    low, high = np.quantile(means, ends)
    return Interval(
        estimate=mean,
        low=float(low),
        high=float(high),
        level=level,
        method="bootstrap over seeds",
    )


def _end(bias: float, z: float, acceleration: float) -> float:
    """Which share of the resamples lies below the interval's end for the normal quantile ``z``."""
    moved = bias + z
    if acceleration * moved >= 1.0:
        return float(moved > 0.0)  # the limit, which only a level near 1 with few seeds reaches
    return float(normal_below(bias + moved / (1.0 - acceleration * moved)))


def documents_bootstrap(
    arm: Floats,
    baseline: Floats,
    level: float,
    *,
    domains: np.ndarray | None,
    resamples: int,
    generator: np.random.Generator,
) -> Interval:
    """The percentile interval of the difference when seeds and documents could be others.

    ``arm`` and ``baseline`` are (S, D), the metric of document d after training with seed s;
    ``domains`` (D,) names each document's domain, None if there is one. The metric is the mean
    over domains of the mean over their documents. Each resample draws seeds with replacement,
    and documents with replacement within each domain, the same documents for every seed and
    both arms: seeds and documents are crossed, as in Owen 2007 (Ann. Appl. Stat. 1, the
    pigeonhole bootstrap). The seeds' shares are spread by sqrt(S / (S - 1)), since resamples of
    few seeds vary too little.

    Raises:
        RequestError: shapes that do not fit, no documents, or a value that is not finite.
    """
    labels = _checked(arm, baseline, domains)
    difference = arm - baseline  # (S, D)
    seeds, total = difference.shape
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    widened = math.sqrt(seeds / max(seeds - 1, 1))
    found = []
    for size in _chunks(resamples, total):
        even = 1.0 / seeds
        of_seeds = even + widened * (_shares(generator, seeds, size) - even)  # (B, S)
        value = np.zeros(size)
        for columns in groups:
            of_documents = _shares(generator, len(columns), size)  # (B, D of the domain)
            value += np.sum((of_seeds @ difference[:, columns]) * of_documents, axis=-1)
        found.append(value / len(groups))
    low, high = np.quantile(np.concatenate(found), [0.5 - level / 2.0, 0.5 + level / 2.0])
    return Interval(
        estimate=float(np.mean([difference[:, columns].mean() for columns in groups])),
        low=float(low),
        high=float(high),
        level=level,
        method="bootstrap over seeds and documents",
    )


def _checked(arm: Floats, baseline: Floats, domains: np.ndarray | None) -> np.ndarray:
    if arm.ndim != 2 or arm.shape != baseline.shape or arm.shape[1] == 0:
        raise RequestError(
            "documents must be two arrays (seeds, documents) of one shape, "
            f"got {arm.shape} and {baseline.shape}"
        )
    for name, scores in (("arm", arm), ("baseline", baseline)):
        if not np.isfinite(scores).all():
            row, column = np.argwhere(~np.isfinite(scores))[0]
            raise RequestError(
                f"document {column} of the {name}, seed row {row}, has the metric "
                f"{scores[row, column]}; leave diverged seeds out, and say so"
            )
    labels = np.zeros(arm.shape[1], dtype=np.int64) if domains is None else np.asarray(domains)
    if labels.shape != arm.shape[1:]:
        raise RequestError(
            f"domains must name one domain a document, {arm.shape[1]}, got {labels.shape}"
        )
    return labels


def _shares(generator: np.random.Generator, n: int, resamples: int) -> Floats:
    """How large a share each of ``n`` has in each resample, (resamples, n), rows sum to 1."""
    picks = generator.integers(n, size=(resamples, n))
    picks += np.arange(resamples)[:, None] * n
    counts = np.bincount(picks.ravel(), minlength=resamples * n)
    return counts.reshape(resamples, n) / n


def _chunks(resamples: int, width: int) -> list[int]:
    most = max(1, _CHUNK // width)
    whole, rest = divmod(resamples, most)
    return [most] * whole + [rest] * (rest > 0)
