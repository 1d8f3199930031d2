"""One token in the operations of a compiled graph, called without a compiler, against the rule."""

from __future__ import annotations

import pytest
import torch

from sparing.experts.backends import traced
from sparing.experts.experts import Experts
from sparing.experts.routing import Routing

DIM, WIDTH, SLOTS = 12, 20, 5


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "taken", [[], [0], [4], [0, 3], [1, 2, 4]], ids=["none", "first", "last", "two", "three"]
)
def test_the_chosen_experts_by_their_weights(gated, bias, taken):
    experts = Experts(DIM, WIDTH, SLOTS, gated=gated, bias=bias)
    experts.init_(generator=torch.Generator().manual_seed(0))
    drawn = torch.Generator().manual_seed(len(taken))
    x = torch.randn(1, DIM, generator=drawn)
    shares = torch.rand(1, SLOTS, generator=drawn)  # those not chosen must not count
    chosen = torch.zeros(1, SLOTS, dtype=torch.bool)
    chosen[0, taken] = True
    with torch.no_grad():
        found = traced.one_token(x, chosen, shares, 3, experts.nets())
        expected = experts.reference(x, Routing(chosen, shares))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_more_than_there_are_slots_and_half_precision():
    experts = Experts(DIM, WIDTH, SLOTS).bfloat16()
    x = torch.randn(1, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    chosen, shares = torch.ones(1, SLOTS, dtype=torch.bool), torch.full((1, SLOTS), 0.2)
    with torch.no_grad():
        found = traced.one_token(x, chosen, shares, 7, experts.nets())
        expected = experts.reference(x, Routing(chosen, shares))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
