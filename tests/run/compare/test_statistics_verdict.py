from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sparing.core.errors import RequestError
from sparing.run.compare.power import equivalence_power
from sparing.run.compare.statistics import Judgement, Margin, judge, parse_margin

LOSS = Margin(low=-0.02, high=0.02, unit="loss", relative=False)
NO_WORSE = Margin(low=None, high=0.02, unit="loss", relative=False)


def seeds(values) -> dict[int, float]:
    return dict(enumerate(values))


def by_differences(differences, margin: Margin = LOSS, **options) -> Judgement:
    baseline = np.random.default_rng(7).normal(2.0, 0.1, len(differences))
    return judge(seeds(baseline + differences), seeds(baseline), margin=margin, **options)


def test_equivalent_with_every_figure_by_scipy():
    d = np.array([0.001, -0.004, 0.003, 0.002, -0.001])
    baseline = np.array([1.9, 2.1, 2.0, 2.2, 1.8])
    found = judge(seeds(baseline + d), seeds(baseline), margin=LOSS)
    assert found.verdict == "equivalent"
    assert found.n == 5
    assert (found.mean_arm, found.mean_baseline) == pytest.approx((2.0002, 2.0))
    assert found.p_low == pytest.approx(stats.ttest_1samp(d, -0.02, alternative="greater").pvalue)
    assert found.p_high == pytest.approx(stats.ttest_1samp(d, 0.02, alternative="less").pvalue)
    assert found.p_difference == pytest.approx(stats.ttest_1samp(d, 0.0).pvalue)
    wanted = stats.ttest_1samp(d, 0.0).confidence_interval(0.95)
    assert (found.paired.low, found.paired.high) == pytest.approx((wanted.low, wanted.high))
    wanted = stats.ttest_ind(baseline + d, baseline, equal_var=False).confidence_interval(0.95)
    assert (found.unpaired.low, found.unpaired.high) == pytest.approx((wanted.low, wanted.high))
    assert found.bootstrap.low == pytest.approx(-0.004)  # no further than the differences reach
    assert found.paired.estimate < found.bootstrap.high < 0.003
    assert found.seeds_needed is None
    inner = stats.ttest_1samp(d, 0.0).confidence_interval(0.9)
    assert f"90 % interval of the difference, {inner.low:+.4g} to {inner.high:+.4g}" in found.why


def test_a_difference_inside_the_margin_is_equivalent_and_says_so():
    found = by_differences([0.009, 0.010, 0.011, 0.010])
    assert found.verdict == "equivalent"
    assert found.p_difference < 0.05
    assert "is not zero" in found.why
    assert "smaller than the margin" in found.why


def test_different_outside_the_margin_and_where_it_may_be_inside():
    found = by_differences([0.05, 0.06, 0.055])
    assert found.verdict == "different"
    assert "lies outside the margin of -0.02 to +0.02" in found.why
    found = by_differences([0.012, 0.018, 0.024, 0.016])
    assert found.verdict == "different"
    assert "inside, but not shown to be" in found.why


def test_undecided_tells_the_seeds_that_decide():
    d = np.array([0.02, -0.015, 0.01, -0.012])
    found = by_differences(d)
    assert found.verdict == "undecided"
    assert f"{found.seeds_needed} seeds in all would decide it with probability 80 %" in found.why
    sd, mean = d.std(ddof=1), d.mean()
    chance = [
        equivalence_power(n, sd=sd, low=-0.02, high=0.02, alpha=0.05, difference=mean)
        for n in (found.seeds_needed - 1, found.seeds_needed)
    ]
    assert chance[0] < 0.8 <= chance[1]
    # the spread of 4 seeds, by the chi-square quantiles that textbooks print: 9.348 and 0.2158
    low, high = math.sqrt(3 / 9.348), math.sqrt(3 / 0.2158)
    assert any(f"between {low:.2g} and {high:.2g} times" in note for note in found.notes)


def test_undecided_beyond_all_seeds():
    found = by_differences([8.0, -8.0, 7.99, -7.99])
    assert found.verdict == "undecided"
    assert found.seeds_needed is None
    assert "more than 10,000 seeds" in found.why


def test_more_seeds_than_there_were():
    found = by_differences([0.01, 0.03], power=0.06)
    assert (found.verdict, found.seeds_needed) == ("undecided", 3)


def test_one_sided_margins():
    better = by_differences([-0.5, -0.51, -0.52], NO_WORSE)
    assert better.verdict == "equivalent"
    assert better.p_low is None
    assert "on the better side" in better.why
    worse = by_differences([0.5, 0.51, 0.52], NO_WORSE)
    assert worse.verdict == "different"
    assert worse.p_high > 0.99
    slightly = by_differences([0.010, 0.011, 0.012], NO_WORSE)
    assert slightly.verdict == "equivalent"
    assert "but within the margin" in slightly.why
    accuracy = parse_margin("-0.5 accuracy", "accuracy", True)
    assert by_differences([5.0, 5.1, 5.2], accuracy).p_high is None
    assert by_differences([5.0, 5.1, 5.2], accuracy).verdict == "equivalent"
    assert by_differences([-5.0, -5.1, -5.2], accuracy).verdict == "different"


def test_identical_runs_are_equivalent_and_look_suspicious():
    found = by_differences(np.zeros(3))
    assert found.verdict == "equivalent"
    assert (found.p_low, found.p_high, found.p_difference) == (0.0, 0.0, 1.0)
    assert (found.paired.low, found.paired.high) == (0.0, 0.0)
    assert (found.bootstrap.low, found.bootstrap.high) == (0.0, 0.0)
    assert any("same for every seed" in note for note in found.notes)


@pytest.mark.parametrize(
    ("constant", "verdict"), [(0.01, "equivalent"), (0.02, "different"), (0.03, "different")]
)
def test_a_constant_difference_has_no_spread_though_its_digits_do(constant, verdict):
    baseline = np.array([0.1, 2.3, 37.7, 1.9, 3.1])
    assert len(set(baseline + constant - baseline)) > 1
    found = judge(seeds(baseline + constant), seeds(baseline), margin=LOSS)
    assert found.verdict == verdict
    assert found.p_difference == 0.0
    assert found.paired.low == found.paired.high == pytest.approx(constant)
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_one_common_seed_and_none():
    one = judge({1: 2.0, 2: 2.1}, {1: 2.5, 3: 2.4}, margin=LOSS)
    assert (one.n, one.verdict, one.paired, one.bootstrap) == (1, None, None, None)
    assert (one.mean_arm, one.mean_baseline) == (2.0, 2.5)
    assert "one seed in common" in one.why
    assert "at least two common seeds" in one.why
    assert one.unpaired.estimate == pytest.approx(2.05 - 2.45)
    assert len([note for note in one.notes if "are left out of the pairs" in note]) == 2
    none = judge({1: 2.0}, {2: 2.5}, margin=LOSS)
    assert (none.n, none.verdict, none.unpaired, none.p_difference) == (0, None, None, None)
    assert (none.mean_arm, none.mean_baseline) == (2.0, 2.5)
    assert "no seed in common" in none.why


def test_pairs_are_common_seeds_and_the_rest_is_named():
    arm = {3: 2.0, 1: 2.1, 9: 5.0}
    found = judge(arm, {1: 2.1, 3: 2.0, 7: 1.0, 8: 1.0}, margin=LOSS)
    assert found.n == 2
    assert found.verdict == "equivalent"
    assert "seeds that only the arm has are left out of the pairs: 9" in found.notes
    assert "seeds that only the baseline has are left out of the pairs: 7, 8" in found.notes
    assert found.unpaired.estimate == pytest.approx(9.1 / 3 - 6.1 / 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
def test_a_diverged_seed_is_refused_by_name(value):
    with pytest.raises(RequestError, match=r"seed 2 of the baseline has the metric .*diverged"):
        judge({1: 1.0, 2: 1.0}, {1: 1.0, 2: value}, margin=LOSS)
    with pytest.raises(RequestError, match=r"seed 1 of the arm"):
        judge({1: value}, {2: 1.0}, margin=LOSS)


def test_no_seed_at_all_is_refused():
    with pytest.raises(RequestError, match="the arm has no finished seed"):
        judge({}, {1: 1.0}, margin=LOSS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"level": 0.5}, "level must lie"),
        ({"level": 95}, "level must lie"),
        ({"level": math.nan}, "level must lie"),
        ({"power": 0.01}, "power must lie"),
        ({"power": 1.0}, "power must lie"),
        ({"looks": 0}, "looks must be at least 1"),
        ({"resamples": 10}, "resamples must be at least 100"),
    ],
)
def test_numbers_out_of_range_are_refused(change, said):
    with pytest.raises(RequestError, match=said):
        by_differences([0.0, 0.01], **change)


def test_a_relative_margin_is_taken_at_the_baselines_mean():
    margin = parse_margin("+-1%", "loss", False)
    arm, baseline = {1: -2.01, 2: -2.02, 3: -1.99}, {1: -2.0, 2: -2.01, 3: -1.99}
    found = judge(arm, baseline, margin=margin)
    plain = judge(arm, baseline, margin=LOSS)
    assert (found.p_low, found.p_high) == pytest.approx((plain.p_low, plain.p_high))
    assert any("-0.02 to +0.02 at the baseline's mean -2" in note for note in found.notes)
    with pytest.raises(RequestError, match="which is zero"):
        judge({1: 0.1, 2: 0.0}, {1: 0.5, 2: -0.5}, margin=margin)


def test_looks_share_the_error_rate():
    d = [0.003, -0.006, 0.010]
    once, thrice = by_differences(d), by_differences(d, looks=3)
    assert (once.verdict, thrice.verdict) == ("equivalent", "undecided")
    assert thrice.alpha == pytest.approx(0.05 / 3)
    assert thrice.paired.level == pytest.approx(1 - 0.05 / 3)
    assert any("one of 3 planned looks" in note for note in thrice.notes)
    assert once.p_high == thrice.p_high


def test_a_rough_bootstrap_is_named():
    assert any("bootstrap over 7 seeds is rough" in n for n in by_differences(np.zeros(7)).notes)
    assert not any("rough" in note for note in by_differences(np.zeros(8)).notes)


def test_documents_widen_nothing_but_their_own_interval():
    rng = np.random.default_rng(0)
    arm, baseline = rng.normal(2, 0.1, (4, 40)), rng.normal(2, 0.1, (4, 40))
    domains = np.repeat([0, 1], [30, 10])
    scores = [
        (x[:, :30].mean(1) + x[:, 30:].mean(1)) / 2  # the mean over domains
        for x in (arm, baseline)
    ]
    with_documents = judge(
        *map(seeds, scores), margin=LOSS, documents=(arm, baseline), domains=domains
    )
    assert with_documents.documents.estimate == pytest.approx(with_documents.paired.estimate)
    assert not any("documents" in note for note in with_documents.notes)
    without = judge(*map(seeds, scores), margin=LOSS)
    assert without == replace(with_documents, documents=None)
    other = judge(*map(seeds, scores), margin=LOSS, documents=(arm, baseline))
    assert any("not the mean over these documents" in note for note in other.notes)
    with pytest.raises(RequestError, match=r"one row for each of the 4 common seeds, got \(3, 40"):
        judge(*map(seeds, scores), margin=LOSS, documents=(arm[:3], baseline[:3]))


def test_plain_data_holds_everything():
    found = by_differences([0.02, -0.015, 0.01], documents=(np.eye(3), np.zeros((3, 3))))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["paired"]["method"] == "paired t"
    assert data["verdict"] == "undecided"
    assert set(data) == set(Judgement.__dataclass_fields__)


# Multiples of 1/64 are exact, so that a shift moves nothing by rounding.
metrics = st.integers(-640, 640).map(lambda x: x / 64)
pairs = st.lists(st.tuples(metrics, metrics), min_size=1, max_size=9)
margins = st.sampled_from([(-1.0, 1.0), (-0.25, 2.0), (None, 1.0), (-0.5, None)])
fast = settings(max_examples=150, deadline=None)


def decided(found: Judgement) -> tuple[object, ...]:
    return found.verdict, found.seeds_needed, found.p_low, found.p_high, found.p_difference


def judged(both, sides, shift: float = 0.0) -> Judgement:
    arm, baseline = ([x + shift for x in side] for side in zip(*both, strict=True))
    margin = Margin(low=sides[0], high=sides[1], unit="loss", relative=False)
    return judge(seeds(arm), seeds(baseline), margin=margin, resamples=100)


@fast
@given(pairs, margins)
def test_swapping_the_arms_mirrors_the_judgement(both, sides):
    one = judged(both, sides)
    mirrored = tuple(None if side is None else -side for side in reversed(sides))
    other = judged([(b, a) for a, b in both], mirrored)
    assert (one.verdict, one.p_low, one.p_high) == (other.verdict, other.p_high, other.p_low)
    assert one.p_difference == other.p_difference
    assert one.seeds_needed == other.seeds_needed
    if one.paired is not None:
        assert (one.paired.low, one.paired.high) == (-other.paired.high, -other.paired.low)
        assert one.unpaired.low == pytest.approx(-other.unpaired.high, abs=1e-9)
    assert json.dumps(one.to_dict(), allow_nan=False)


@fast
@given(pairs, margins, st.integers(-100, 100))
def test_a_shift_of_both_arms_changes_nothing(both, sides, shift):
    assert decided(judged(both, sides)) == decided(judged(both, sides, shift))


@fast
@given(pairs, margins, st.randoms(use_true_random=False))
def test_the_names_of_seeds_do_not_matter_but_pairs_do(both, sides, random):
    shuffled = random.sample(both, len(both))
    one, other = judged(both, sides), judged(shuffled, sides)
    assert one.verdict == other.verdict
    if one.p_difference is not None:
        assert one.p_difference == pytest.approx(other.p_difference, abs=1e-12)


@fast
@given(pairs)
def test_the_verdict_is_that_of_the_intervals(both):
    found = judged(both, (-1.0, 1.0))
    if found.verdict is None:
        assert len(both) == 1
        return
    d = np.array([a - b for a, b in both])
    half = stats.t.ppf(0.95, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    edge = min(abs(abs(d.mean() + sign * half) - 1.0) for sign in (-1, 1))
    if edge > 1e-9:
        inside = abs(d.mean()) + half < 1.0
        assert (found.verdict == "equivalent") == inside
    if found.verdict == "different":
        assert not found.paired.low < 0.0 < found.paired.high
