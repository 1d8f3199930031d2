from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.run.compare.statistics import Margin, parse_margin


@pytest.mark.parametrize("sign", ["+-", "±", "+/-", "+ / -", "+\u2212"])
@pytest.mark.parametrize("gap", ["", " "])
def test_both_signs_ask_for_equivalence(sign, gap):
    found = parse_margin(f" {sign}{gap}0.02 bits_per_byte ", "bits_per_byte", False)
    assert found == Margin(low=-0.02, high=0.02, unit="bits_per_byte", relative=False)


def test_one_sign_bounds_the_worse_side():
    higher = parse_margin("+0.02 bits_per_byte", "bits_per_byte", False)
    assert (higher.low, higher.high) == (None, 0.02)
    lower = parse_margin("-.5 accuracy", "accuracy", True)
    assert (lower.low, lower.high) == (-0.5, None)
    assert lower.bounds(80.0) == (-0.5, math.inf)


def test_percent_is_relative_to_the_size_of_the_baselines_mean():
    found = parse_margin("+-1%", "loss", False)
    assert found == Margin(low=-1.0, high=1.0, unit="%", relative=True)
    assert found.bounds(2.0) == found.bounds(-2.0) == (-0.02, 0.02)
    assert parse_margin("-5e-1 %", "accuracy", True).bounds(80.0) == (-0.4, math.inf)
    with pytest.raises(RequestError, match=r"mean, which is zero; give it in units"):
        found.bounds(0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.02 loss", "has no sign"),
        ("0.02", "has no sign"),
        ("1%", "has no sign"),
        ("+-0.02", "has no unit"),
        ("+0.02", "has no unit"),
        ("+--0.02 loss", "one sign too many"),
        ("±-0.02 loss", "one sign too many"),
        ("--0.02 loss", "one sign too many"),
        ("++0.02 loss", "one sign too many"),
        ("+-0 loss", "finite number above zero"),
        ("+-0.0%", "finite number above zero"),
        ("+-nan loss", "finite number above zero"),
        ("+-inf loss", "finite number above zero"),
        ("+-1e999 loss", "finite number above zero"),
        ("+-0,02 loss", "finite number above zero"),
        ("+-1.2.3 loss", "finite number above zero"),
        ("+-0.02 accuracy", 'is in "accuracy", and the comparison in "loss"'),
        ("+-0.02 Loss", 'is in "Loss", and the comparison in "loss"'),
        ("+-1% loss", "could mean percent"),
        ("-0.02 loss", "lower loss is better, which needs no margin"),
        ("-1%", "lower loss is better, which needs no margin"),
        ("", "not a sign, a number and a unit"),
        ("+-", "not a sign, a number and a unit"),
        ("+- loss", "not a sign, a number and a unit"),
        ("about 0.02 loss", "not a sign, a number and a unit"),
        (0.02, "not a sign, a number and a unit"),
        (None, "not a sign, a number and a unit"),
    ],
)
def test_a_bad_margin_is_refused_with_the_right_spelling(text, said):
    with pytest.raises(RequestError) as caught:
        parse_margin(text, "loss", False)
    assert said in str(caught.value)
    for right in ('"+-0.02 loss"', '"+0.02 loss"', '"+-1%"'):
        assert right in str(caught.value)


def test_the_right_spelling_turns_with_the_metric():
    with pytest.raises(RequestError, match=r'higher accuracy is better.*"-0\.02 accuracy"'):
        parse_margin("+0.5 accuracy", "accuracy", True)


@pytest.mark.parametrize(
    ("low", "high"),
    [(None, None), (0.0, 1.0), (-1.0, 0.0), (0.1, 0.2), (-math.inf, 1.0), (-1.0, math.nan)],
)
def test_a_margin_without_zero_inside_is_refused(low, high):
    with pytest.raises(RequestError, match="margin"):
        Margin(low=low, high=high, unit="loss", relative=False)


@settings(deadline=None)
@given(
    st.sampled_from(["±", "+", "-"]),
    st.floats(1e-9, 1e9).map(lambda x: float(f"{x:g}")),
    st.sampled_from(["%", " bits_per_byte"]),
)
def test_what_a_margin_prints_is_read_back(sign, size, unit):
    margin = parse_margin(f"{sign}{size:g}{unit}", "bits_per_byte", sign == "-")
    assert parse_margin(str(margin), "bits_per_byte", sign == "-") == margin


def test_a_lopsided_margin_prints_both_sides():
    assert str(Margin(low=-0.01, high=0.02, unit="loss", relative=False)) == "-0.01 to +0.02 loss"


@settings(deadline=None)
@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_margin(text, "loss", False)
    except RequestError:
        return
    assert found.high is not None
