"""What a routed method names as spending the same by chance."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from sparing import HashExperts, RandomExperts, TopAny, TopK
from sparing.core import registry
from sparing.core.method import Method
from sparing.experts.method import RoutedExperts


def test_top_k_keeps_its_experts_and_k():
    options = asdict(TopK.Options(experts=6, k=2, width=16, zero_output=True, where="*.0.*"))
    random = TopK.at_random(options, {"mean_k": 2.0})["random"]
    same = {"experts": 6, "k": 2.0, "where": "*.0.*", "width": 16, "zero_output": True}
    assert same.items() <= random.items()
    assert TopK.at_random(options, {})["random"]["k"] == 2.0


def test_top_any_takes_what_tokens_took():
    options = asdict(TopAny.Options(max_experts=12, target_k=4, width=8))
    assert TopAny.at_random(options, {"mean_k": 1.82})["random"]["k"] == 1.82
    assert TopAny.at_random(options, {"mean_k": 1.82})["random"]["experts"] == 12
    assert TopAny.at_random(options, {})["random"]["k"] == 4.0


@pytest.mark.parametrize("kind", [Method, RandomExperts, HashExperts])
def test_a_method_that_chooses_nothing_has_no_counterpart(kind):
    options = {} if kind is Method else asdict(kind.Options())
    assert kind.at_random(options, {}) is None


@pytest.mark.parametrize("name", [r.name for r in registry.methods()])
def test_the_counterpart_can_be_built_for_every_routed_method(name):
    kind = registry.method(name)
    if not issubclass(kind, RoutedExperts) or not kind.chooses:
        return
    options = asdict(kind.Options(shared=1, residual=True))
    random = RandomExperts(**kind.at_random(options, {"mean_k": 1.5})["random"])
    assert (random.slots, random.expected_k, random.options.shared) == (8, 1.5, 1)
