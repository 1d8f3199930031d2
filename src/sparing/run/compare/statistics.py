"""The verdict of a comparison: equivalent, different or undecided, from paired seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.run.compare.bootstrap import FEW_SEEDS, documents_bootstrap, seeds_bootstrap
from sparing.run.compare.distributions import Floats
from sparing.run.compare.intervals import (
    Interval,
    paired_interval,
    paired_tests,
    welch_interval,
)
from sparing.run.compare.judgement import Judgement, Verdict
from sparing.run.compare.margin import Margin, parse_margin
from sparing.run.compare.power import seeds_needed, seeds_to_decide
from sparing.run.compare.reasons import Reasons, margin_note, spread_note
from sparing.run.compare.sequential import spend

__all__ = [
    "Interval",
    "Judgement",
    "Margin",
    "Verdict",
    "judge",
    "parse_margin",
    "seeds_needed",
    "spend",
]

_LARGEST = 1e100
"""A metric beyond this is a diverged run, and its square would overflow."""


def judge(
    arm: Mapping[int, float],
    baseline: Mapping[int, float],
    *,
    margin: Margin,
    level: float = 0.95,
    power: float = 0.8,
    looks: int = 1,
    documents: tuple[Floats, Floats] | None = None,
    domains: np.ndarray | None = None,
    resamples: int = 10_000,
) -> Judgement:
    """Compare an arm with its baseline, both {seed: metric}, pairing the seeds they share.

    With alpha = (1 - ``level``) / ``looks``, the verdict is "equivalent" if both one-sided
    paired t tests against the margin reject at alpha, which is to say that the interval at
    1 - 2 alpha lies inside it (Schuirmann 1987; Lakens 2017). Else it is "different" if the
    two-sided paired t test of no difference rejects at alpha, else "undecided". A significant
    difference inside the margin is "equivalent", and ``why`` says so. Fewer than two common
    seeds have no verdict. ``looks`` is how often a verdict is sought while seeds are added.

    ``documents`` are the scores (n, D) of held-out documents of arm and baseline, rows in
    increasing order of the common seeds, ``domains`` (D,) their domains. Bootstraps draw
    ``resamples`` times from a generator with a fixed seed, so equal data give equal intervals.

    Raises:
        RequestError: an arm without seeds, a metric that is not a finite number (leave diverged
            seeds out, and say so), documents that do not fit, or a number out of range.
    """
    alpha = _error_rate(level, power, looks)
    require_whole("resamples", resamples, 100)
    _require_finite("arm", arm)
    _require_finite("baseline", baseline)
    seeds = sorted(set(arm) & set(baseline))
    n = len(seeds)
    every = [np.array([float(x[s]) for s in sorted(x)]) for x in (arm, baseline)]
    ours, theirs = [np.array([float(x[s]) for s in seeds]) for x in (arm, baseline)]
    means = [float(x.mean()) for x in ((ours, theirs) if n else every)]
    low, high = margin.bounds(means[1])
    notes = _left_out(arm, baseline, n)
    if looks > 1:
        notes.append(
            f"one of {looks} planned looks: intervals and tests are at an error rate of "
            f"{100 * alpha:.3g} %, so that over all looks it is at most {100 * alpha * looks:.3g} %"
        )
    if margin.relative:
        notes.append(margin_note(margin, low, high, means[1]))
    shared: dict[str, Any] = {
        "n": n,
        "mean_arm": means[0],
        "mean_baseline": means[1],
        "unpaired": _unpaired(every[0], every[1], 1.0 - alpha),
        "alpha": alpha,
        "notes": notes,
    }
    if n < 2:
        return _no_verdict(shared)

    differences = ours - theirs
    # Differences that are equal but for floating point have no spread.
    rounding = 8.0 * float(np.finfo(np.float64).eps) * float(np.abs([ours, theirs]).max())
    tests = paired_tests(differences, low, high, rounding=rounding)
    paired = paired_interval(differences, 1.0 - alpha, rounding=rounding)
    if tests.error == 0.0:
        notes.append(
            "the difference is the same for every seed: check that the seed reaches the training"
        )
    if n < FEW_SEEDS:
        notes.append(
            f"a bootstrap over {n} seeds is rough and usually too narrow: trust the t interval"
        )
    generator = np.random.default_rng(0)
    bootstrap = seeds_bootstrap(differences, 1.0 - alpha, resamples=resamples, generator=generator)
    over_documents = None
    if documents is not None:
        over_documents = _documents(
            documents,
            domains,
            paired,
            n,
            resamples=max(100, resamples // 4),
            generator=generator,
            notes=notes,
        )

    p_low = None if margin.low is None else float(tests.p_low)
    p_high = None if margin.high is None else float(tests.p_high)
    p_difference = float(tests.p_difference)
    inner = paired_interval(differences, 1.0 - 2.0 * alpha, rounding=rounding)
    words = Reasons(low=low, high=high, unit="" if margin.relative else f" {margin.unit}")
    needed: int | None = None
    verdict: Verdict
    if tests.equivalent(alpha):
        verdict, why = "equivalent", words.equivalent(inner, p_low, p_high, p_difference)
    elif tests.different(alpha):
        verdict, why = "different", words.different(paired, p_difference)
    else:
        needed = seeds_to_decide(
            sd=float(differences.std(ddof=1)),
            low=low,
            high=high,
            alpha=alpha,
            power=power,
            difference=paired.estimate,
        )
        # With a power near even odds the observed n may itself have been enough, and was not.
        needed = None if needed is None else max(needed, n + 1)
        verdict, why = "undecided", words.undecided(inner, power, needed)
        notes.append(spread_note(n, level))
    return Judgement(
        paired=paired,
        bootstrap=bootstrap,
        documents=over_documents,
        p_low=p_low,
        p_high=p_high,
        p_difference=p_difference,
        verdict=verdict,
        why=why,
        seeds_needed=needed,
        **shared,
    )


def _unpaired(arm: Floats, baseline: Floats, level: float) -> Interval | None:
    enough = len(arm) > 1 and len(baseline) > 1
    return welch_interval(arm, baseline, level) if enough else None


def _no_verdict(shared: dict[str, Any]) -> Judgement:
    if shared["n"] == 0:
        why = "arm and baseline have no seed in common, so nothing can be paired: no verdict"
    else:
        why = "one seed in common says nothing about the spread: no interval and no verdict"
    return Judgement(why=f"{why}; run both on at least two common seeds", **shared)


def _documents(
    documents: tuple[Floats, Floats],
    domains: np.ndarray | None,
    paired: Interval,
    n: int,
    *,
    resamples: int,
    generator: np.random.Generator,
    notes: list[str],
) -> Interval:
    arm, baseline = (np.asarray(scores, dtype=np.float64) for scores in documents)
    if arm.shape[:1] != (n,):
        raise RequestError(
            f"documents must have one row for each of the {n} common seeds, got {arm.shape}"
        )
    found = documents_bootstrap(
        arm, baseline, paired.level, domains=domains, resamples=resamples, generator=generator
    )
    if not math.isclose(found.estimate, paired.estimate, rel_tol=1e-3, abs_tol=1e-6):
        notes.append(
            f"the documents' mean difference is {found.estimate:+.4g}, the metric's "
            f"{paired.estimate:+.4g}: the metric is not the mean over these documents"
        )
    return found


def _error_rate(level: float, power: float, looks: int) -> float:
    if not 0.5 < level < 1.0:
        raise RequestError(f"level must lie between 0.5 and 1, such as 0.95, got {level}")
    alpha = spend(round(1.0 - level, 12), looks, 1)
    if not alpha < power < 1.0:
        raise RequestError(f"power must lie between alpha and 1, such as 0.8, got {power}")
    return alpha


def _require_finite(name: str, metrics: Mapping[int, float]) -> None:
    if not metrics:
        raise RequestError(f"the {name} has no finished seed; run at least two")
    for seed, value in sorted(metrics.items()):
        if not abs(value) < _LARGEST:
            raise RequestError(
                f"seed {seed} of the {name} has the metric {value}, which is a diverged run; "
                "leave such seeds out, and say so"
            )


def _left_out(arm: Mapping[int, float], baseline: Mapping[int, float], n: int) -> list[str]:
    found = []
    for name, ours, theirs in (("arm", arm, baseline), ("baseline", baseline, arm)):
        alone = sorted(set(ours) - set(theirs))
        if alone and n:
            found.append(
                f"seeds that only the {name} has are left out of the pairs: "
                + ", ".join(map(str, alone))
            )
    return found
