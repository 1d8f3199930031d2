"""How differences are paired by seed and week in the comparison of batches."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

WEEKLY = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "weekly.py"))
difference, whose = WEEKLY["difference"], WEEKLY["whose"]


def arms(shift: float, noise: float, seeds: int = 3) -> tuple[dict, dict]:
    g = np.random.default_rng(0)
    base = {seed: 80 + g.normal(size=5) for seed in range(seeds)}
    return {s: x + shift + noise * g.normal(size=5) for s, x in base.items()}, base


def test_weeks_of_different_sizes_have_the_mean_of_all_rows():
    g = np.random.default_rng(1)
    values, week = 100 * g.random(500), g.choice([49, 50, 53], 500, p=[0.7, 0.2, 0.1])
    found = WEEKLY["by_week"](values, week)
    assert found.shape == (3,)
    assert found.mean() == pytest.approx(values.mean())
    assert found[2] == pytest.approx(3 * values[week == 53].sum() / 500)


def test_verdicts_follow_the_half_width_and_the_finer_margin_needs_it():
    same = difference(*arms(0.01, 0.01))
    assert (same["verdict"], same["margin"]) == ("equivalent", 0.1)
    apart = difference(*arms(-1.0, 0.05))
    assert apart["verdict"] == "different"
    assert apart["points"] == pytest.approx(-1.0, abs=0.1)
    vague = difference(*arms(0.0, 1.0))
    assert (vague["verdict"], vague["margin"]) == ("undecided", 0.3)
    for name, (low, high) in vague["intervals"].items():
        assert low < vague["points"] < high, name
        assert high - low <= 2 * vague["half-width"] + 1e-3


def test_only_seeds_that_both_have_are_paired_and_one_has_no_verdict():
    arm, base = arms(0.5, 0.1)
    del arm[0], base[2]
    found = difference(arm, base)
    assert (found["seeds"], found["verdict"]) == ([1], "none: one seed")
    assert difference({0: base[0]}, {1: base[1]}) is None


def test_a_gain_that_is_there_without_the_clip_is_the_schedules():
    gain, nothing = difference(*arms(1.0, 0.05)), difference(*arms(0.0, 0.01))
    assert "the schedule's" in whose(nothing, gain)
    told = whose(gain, nothing)
    assert "the clip gains 1" in told
    assert "the schedule's" not in told
    assert "not decided" in whose(difference(*arms(0.0, 1.0)), gain)
    assert whose(None, gain) == "not measured"


def test_a_diverged_arm_is_never_the_best():
    values = {"a": WEEKLY["mean"]([]), "b": 70.0, "c": 80.5}
    assert WEEKLY["best"](values) == "c"
