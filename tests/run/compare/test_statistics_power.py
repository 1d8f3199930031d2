from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from sparing.core.errors import RequestError
from sparing.run.compare import power
from sparing.run.compare.intervals import paired_tests
from sparing.run.compare.power import difference_power, equivalence_power, seeds_to_decide
from sparing.run.compare.statistics import Margin, parse_margin, seeds_needed, spend


def by_quadrature(n, sd, low, high, alpha, difference):
    """P(both tests reject), integrated adaptively over the sample deviation."""
    df, root = n - 1, math.sqrt(n) / sd
    critical = stats.t.ppf(1 - alpha, df)
    most = (high - low) * root / (2 * critical)

    def at(s):
        upper = stats.norm.cdf((high - difference) * root - critical * s)
        lower = stats.norm.cdf((low - difference) * root + critical * s)
        return (upper - lower) * stats.chi.pdf(s * math.sqrt(df), df) * math.sqrt(df)

    return integrate.quad(at, 0, most, limit=400, epsabs=1e-11, points=[min(most, 1.0) * 0.999])[0]


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize("sd", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("difference", [0.0, 0.4, 1.0, -2.0])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_power_is_that_of_an_adaptive_quadrature(n, sd, difference, alpha):
    asked = {"sd": sd, "low": -1.0, "high": 1.5, "alpha": alpha, "difference": difference}
    assert equivalence_power(n, **asked) == pytest.approx(by_quadrature(n, **asked), abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 8, 100])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_one_side_is_the_noncentral_t(n, alpha):
    found = equivalence_power(n, sd=0.7, low=-0.3, high=math.inf, alpha=alpha, difference=0.1)
    critical, effect = stats.t.ppf(1 - alpha, n - 1), 0.4 / 0.7 * math.sqrt(n)
    assert found == pytest.approx(stats.nct.sf(critical, n - 1, effect), abs=1e-9)
    mirrored = equivalence_power(n, sd=0.7, low=-math.inf, high=0.3, alpha=alpha, difference=-0.1)
    assert mirrored == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 30])
@pytest.mark.parametrize("difference", [0.0, 0.3, -1.0])
def test_the_power_of_a_difference_is_the_noncentral_t(n, difference):
    critical, effect = stats.t.ppf(0.975, n - 1), difference * math.sqrt(n)
    wanted = stats.nct.sf(critical, n - 1, effect) + stats.nct.sf(critical, n - 1, -effect)
    found = difference_power(n, sd=1.0, alpha=0.05, difference=difference)
    assert found == pytest.approx(wanted, abs=1e-8)


def test_a_published_power():
    """A crossover study of 40 with a coefficient of variation of 30 %: 0.8158.

    The figure is from the documentation of PowerTOST (Labes, Schuetz, Lang). The study has
    n - 2 degrees of freedom, and an error of sqrt(2 / n) deviations within subjects.
    """
    error = math.sqrt(math.log(1 + 0.3**2) * 2 / 40)
    margin, ratio = math.log(1.25), math.log(0.95)
    found = power._both(38, (margin + ratio) / error, (margin - ratio) / error, 0.05)
    assert found == pytest.approx(0.815845, abs=5e-7)


@pytest.mark.parametrize(("n", "difference"), [(3, 0.0), (5, 0.0), (5, 0.5), (10, 1.0)])
def test_the_power_is_what_a_simulation_finds(n, difference):
    many = 100_000
    d = difference + 0.6 * np.random.default_rng(n).normal(size=(many, n))
    tests = paired_tests(d, -1.0, 1.0)
    wanted = equivalence_power(n, sd=0.6, low=-1.0, high=1.0, alpha=0.05, difference=difference)
    assert tests.equivalent(0.05).mean() == pytest.approx(wanted, abs=4 * 0.5 / math.sqrt(many))
    wanted = difference_power(n, sd=0.6, alpha=0.05, difference=difference)
    found = (tests.p_difference <= 0.05).mean()
    assert found == pytest.approx(wanted, abs=4 * 0.5 / math.sqrt(many))


@pytest.mark.parametrize("sd", [0.05, 0.4, 1.0, 2.5])
@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("difference", [0.0, -0.5])
def test_the_seeds_needed_are_the_fewest(sd, wanted, difference):
    asked = {"sd": sd, "low": -1.0, "high": 1.0, "alpha": 0.05, "difference": difference}
    found = seeds_needed(sd, 1.0, 0.05, wanted, difference)
    first = next(n for n in range(2, 10_000) if equivalence_power(n, **asked) >= wanted)
    assert found == first


def test_the_seeds_needed_for_any_kind_of_margin():
    both = parse_margin("+-0.02 loss", "loss", False)
    one = parse_margin("+0.02 loss", "loss", False)
    assert seeds_needed(0.02, both, 0.05, 0.8) == seeds_needed(0.02, 0.02, 0.05, 0.8)
    # to show less costs less; by the normal formula 6.2 and 8.6 seeds, too few
    assert seeds_needed(0.02, one, 0.05, 0.8) == seeds_needed(0.02, (-math.inf, 0.02), 0.05, 0.8)
    assert seeds_needed(0.02, one, 0.05, 0.8) == 8
    assert seeds_needed(0.02, both, 0.05, 0.8) == 11
    with pytest.raises(RequestError, match="relative"):
        seeds_needed(0.02, parse_margin("+-1%", "loss", False), 0.05, 0.8)


def test_seeds_that_nobody_can_run_are_none():
    assert seeds_needed(1.0, 0.01, 0.05, 0.8) is None
    assert seeds_needed(0.01, 0.02, 0.05, 0.8, difference=0.02) is None
    assert seeds_needed(0.0, 0.02, 0.05, 0.8, difference=0.03) is None
    assert seeds_needed(0.0, 0.02, 0.05, 0.8) == 2
    assert (
        seeds_to_decide(sd=1.0, low=-0.01, high=0.01, alpha=0.05, power=0.8, difference=0) is None
    )


def test_a_difference_decides_where_equivalence_cannot():
    asked = {"sd": 0.02, "alpha": 0.05, "power": 0.8}
    beyond = seeds_to_decide(low=-0.02, high=0.02, difference=0.03, **asked)
    assert difference_power(beyond, sd=0.02, alpha=0.05, difference=0.03) >= 0.8
    assert difference_power(beyond - 1, sd=0.02, alpha=0.05, difference=0.03) < 0.8
    inside = seeds_to_decide(low=-0.02, high=0.02, difference=0.001, **asked)
    assert inside == seeds_needed(0.02, 0.02, 0.05, 0.8, 0.001)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sd": -1.0}, "sd must be"),
        ({"sd": math.nan}, "sd must be"),
        ({"sd": math.inf}, "sd must be"),
        ({"margin": 0.0}, "both sides of zero"),
        ({"margin": math.nan}, "both sides of zero"),
        ({"margin": (0.1, 0.2)}, "both sides of zero"),
        ({"alpha": 0.0}, "alpha must lie"),
        ({"alpha": 0.5}, "alpha must lie"),
        ({"power": 0.04}, "power must lie"),
        ({"power": 1.0}, "power must lie"),
        ({"difference": math.inf}, "difference must be"),
    ],
)
def test_numbers_out_of_range_are_refused(change, said):
    with pytest.raises(RequestError, match=said):
        seeds_needed(**{"sd": 1.0, "margin": 1.0, "alpha": 0.05, "power": 0.8, **change})


def test_no_spread_decides_with_any_seeds():
    margin = Margin(low=-0.1, high=None, unit="loss", relative=False)
    low, high = margin.bounds(1.0)
    assert equivalence_power(2, sd=0.0, low=low, high=high, alpha=0.05) == 1.0
    assert equivalence_power(2, sd=0.0, low=low, high=high, alpha=0.05, difference=-0.1) == 0.0
    assert difference_power(2, sd=0.0, alpha=0.05, difference=0.0) == 0.0
    assert difference_power(2, sd=0.0, alpha=0.05, difference=1e-9) == 1.0


def test_the_looks_spend_the_error_rate_and_no_more():
    assert spend(0.05, 1, 1) == 0.05
    assert sum(spend(0.05, 4, look) for look in range(1, 5)) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("alpha", "looks", "look", "said"),
    [
        (0.05, 3, 4, "look 4 was not planned: 3 were"),
        (0.05, 3, 0, "look must be at least 1"),
        (0.05, 0, 1, "looks must be at least 1"),
        (0.05, 2.0, 1, "looks must be a whole number"),
        (math.nan, 2, 1, "alpha must be in"),
        (1.5, 2, 1, "alpha must be in"),
    ],
)
def test_a_look_that_was_not_planned_is_refused(alpha, looks, look, said):
    with pytest.raises(RequestError, match=said):
        spend(alpha, looks, look)
