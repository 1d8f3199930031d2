from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from sparing.core.errors import RequestError
from sparing.run.compare import distributions
from sparing.run.compare.bootstrap import documents_bootstrap, seeds_bootstrap
from sparing.run.compare.intervals import paired_interval, paired_tests, welch_interval


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def tail_of_two(t: float) -> float:
    """P(T > t) with two degrees of freedom, which has a closed form."""
    return 0.5 - t / (2.0 * math.sqrt(2.0 + t * t))


def test_three_seeds_by_hand():
    # mean 2, deviation 1, standard error 1 / sqrt(3)
    tests = paired_tests(np.array([1.0, 2.0, 3.0]), -1.0, 4.0)
    root = math.sqrt(3.0)
    assert tests.mean == 2.0
    assert tests.error == pytest.approx(1.0 / root, abs=1e-15)
    assert tests.p_low == pytest.approx(tail_of_two(3.0 * root), abs=1e-14)
    assert tests.p_high == pytest.approx(tail_of_two(2.0 * root), abs=1e-14)
    assert tests.p_difference == pytest.approx(2.0 * tail_of_two(2.0 * root), abs=1e-14)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
def test_the_paired_tests_are_scipys(n):
    d = 0.3 + drawn(7, n, seed=n)
    tests = paired_tests(d, -0.5, 1.5)
    for found, bound, side in ((tests.p_low, -0.5, "greater"), (tests.p_high, 1.5, "less")):
        wanted = stats.ttest_1samp(d, bound, axis=-1, alternative=side).pvalue
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
    np.testing.assert_allclose(tests.p_difference, stats.ttest_1samp(d, 0, axis=-1).pvalue, 1e-9)
    for alpha in (0.01, 0.05, 0.2):
        both = (tests.p_low <= alpha) & (tests.p_high <= alpha)
        assert (tests.equivalent(alpha) == both).all()
        assert (tests.different(alpha) == (~both & (tests.p_difference <= alpha))).all()


def test_both_tests_reject_where_the_narrower_interval_is_inside():
    d = 0.1 + drawn(400, 4, seed=3)
    decided = paired_tests(d, -1.0, 1.0).equivalent(0.05)
    intervals = [paired_interval(row, 0.9) for row in d]
    inside = [found.low > -1.0 and found.high < 1.0 for found in intervals]
    assert 0 < sum(inside) < 400
    assert decided.tolist() == inside


def test_an_unbounded_side_always_rejects():
    tests = paired_tests(drawn(5), -math.inf, 0.5)
    assert tests.p_low == 0.0
    assert tests.p_high > 0.0


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_the_t_intervals_are_scipys(level):
    arm, baseline = drawn(6, seed=1), 3.0 * drawn(4, seed=2) + 1.0
    found = welch_interval(arm, baseline, level)
    wanted = stats.ttest_ind(arm, baseline, equal_var=False).confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-10)
    found = paired_interval(arm, level)
    wanted = stats.ttest_1samp(arm, 0.0).confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-10)


def test_arms_without_spread_have_an_interval_without_width():
    flat = np.full(3, 2.0)
    found = welch_interval(flat, flat - 0.5, 0.95)
    assert (found.low, found.estimate, found.high) == (0.5, 0.5, 0.5)
    one_sided = welch_interval(flat, np.array([1.0, 2.0]), 0.95)
    assert one_sided.high - one_sided.estimate == pytest.approx(0.5 * stats.t.ppf(0.975, 1))


def bootstrap(d: np.ndarray, resamples: int = 40_000, level: float = 0.95):
    return seeds_bootstrap(d, level, resamples=resamples, generator=np.random.default_rng(5))


@pytest.mark.parametrize("n", [9, 30])
def test_the_bootstrap_over_seeds_is_scipys_at_the_expanded_level(n):
    d = np.exp(drawn(n, seed=n))  # skewed, so that the corrections matter
    found = bootstrap(d, level=0.9)
    reach = stats.t.ppf(0.95, n - 1) * math.sqrt(n / (n - 1))
    wanted = stats.bootstrap(
        (d,),
        np.mean,
        n_resamples=40_000,
        method="BCa",
        confidence_level=2 * stats.norm.cdf(reach) - 1,
        rng=np.random.default_rng(6),
    ).confidence_interval
    width = wanted.high - wanted.low
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.02 * width)
    # without the corrections for bias and skew it would be another interval
    plain = d[np.random.default_rng(1).integers(n, size=(40_000, n))].mean(1)
    assert found.high > np.quantile(plain, stats.norm.cdf(reach)) + 0.02 * width


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_bootstrap_stays_within_the_differences_at_any_level(sign):
    d = sign * np.array([0.0, 0.0, 1.0])
    found = bootstrap(d, resamples=1000, level=0.9999)
    assert d.min() <= found.low <= found.estimate <= found.high <= d.max()
    assert (found.high if sign > 0 else found.low) == sign


def test_the_bootstrap_repeats_and_takes_the_smallest_inputs():
    assert bootstrap(drawn(5)) == bootstrap(drawn(5))
    flat = bootstrap(np.full(4, 0.1), resamples=100)
    assert (flat.low, flat.high) == pytest.approx((0.1, 0.1), abs=1e-15)
    two = bootstrap(np.array([1.0, 2.0]), resamples=1000)
    assert (two.low, two.high) == (1.0, 2.0)


def test_the_bootstrap_over_documents_is_the_plain_one():
    """Against a loop that copies the chosen rows and columns, one resample at a time."""
    effect, noise = drawn(6, 1, seed=1), drawn(6, 30, seed=2)
    arm, baseline = 0.3 + effect + noise, drawn(6, 30, seed=3)
    domains = np.array(["a"] * 20 + ["b"] * 10)
    found = documents_bootstrap(
        arm, baseline, 0.9, domains=domains, resamples=8000, generator=np.random.default_rng(0)
    )
    picks, values = np.random.default_rng(9), []
    for _ in range(8000):
        rows = picks.integers(6, size=6)
        first, second = picks.integers(20, size=20), 20 + picks.integers(10, size=10)
        d = arm - baseline
        d = d.mean(0) + math.sqrt(6 / 5) * (d[rows].mean(0) - d.mean(0))
        values.append((d[first].mean() + d[second].mean()) / 2)
    low, high = np.quantile(values, [0.05, 0.95])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02 * (high - low))
    halves = [(arm - baseline)[:, part].mean() for part in (slice(0, 20), slice(20, 30))]
    assert found.estimate == pytest.approx(sum(halves) / 2)
    assert found.method == "bootstrap over seeds and documents"


def test_documents_of_one_domain_and_equal_documents():
    arm = drawn(4, 12)
    settings = {"resamples": 500, "level": 0.95}
    one, named = (
        documents_bootstrap(arm, arm * 0, domains=d, generator=np.random.default_rng(0), **settings)
        for d in (None, np.full(12, 7))
    )
    assert one == named
    flat = documents_bootstrap(
        arm, arm - 0.25, domains=None, generator=np.random.default_rng(0), **settings
    )
    assert (flat.low, flat.high) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize(
    ("arm", "baseline", "domains", "said"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), None, r"one shape, got \(2, 3\) and \(2, 4\)"),
        (np.zeros(3), np.zeros(3), None, r"\(seeds, documents\)"),
        (np.zeros((2, 0)), np.zeros((2, 0)), None, r"\(seeds, documents\)"),
        (np.zeros((2, 3)), np.full((2, 3), np.nan), None, "document 0 of the baseline, seed row 0"),
        (np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(2), r"one domain a document, 3, got \(2,\)"),
    ],
)
def test_documents_that_do_not_fit_are_refused(arm, baseline, domains, said):
    with pytest.raises(RequestError, match=said):
        documents_bootstrap(
            arm,
            baseline,
            0.95,
            domains=domains,
            resamples=100,
            generator=np.random.default_rng(0),
        )


def test_a_missing_scipy_says_what_to_install(monkeypatch):
    distributions._special.cache_clear()
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(RequestError, match=r"install \"sparing\[compare\]\""):
        distributions.t_below(0.0, 3)


def test_scipy_is_imported_at_first_use_only():
    code = (
        "import sys, sparing.run.compare.statistics; assert 'scipy' not in sys.modules;"
        "sparing.run.compare.statistics.seeds_needed(1.0, 1.0, 0.05, 0.8);"
        "assert 'scipy.stats' not in sys.modules and 'scipy.special' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
