"""What a routed method names as spending the same by chance."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from sparing import TopAny, TopK
from sparing.core.method import Method


def test_top_k_keeps_its_experts_and_k():
    options = asdict(TopK.Options(experts=6, k=2, width=16, zero_output=True, where="*.0.*"))
    assert TopK.at_random(options, {"mean_k": 2.0}) == {
        "random": {"experts": 6, "k": 2.0, "where": "*.0.*", "width": 16, "init": "fresh",
                   "zero_output": True}
    }  # fmt: skip
    assert TopK.at_random(options, {})["random"]["k"] == 2.0


def test_top_any_takes_what_tokens_took():
    options = asdict(TopAny.Options(max_experts=12, target_k=4, width=8))
    assert TopAny.at_random(options, {"mean_k": 1.82})["random"]["k"] == 1.82
    assert TopAny.at_random(options, {"mean_k": 1.82})["random"]["experts"] == 12
    assert TopAny.at_random(options, {})["random"]["k"] == 4.0


def test_a_method_that_chooses_nothing_has_no_counterpart():
    assert Method.at_random({}, {}) is None


@pytest.mark.parametrize("kind", [TopK, TopAny])
def test_options_survive_as_the_methods_own(kind):
    options = kind.at_random(asdict(kind.Options()), {"mean_k": 1.5})["random"]
    assert set(options) >= {"experts", "k", "width", "zero_output"}
