from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.experts.routing import Routing


@st.composite
def maps(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A boolean map (T, E), T and E from none or one up, of any density, and weights for it."""
    tokens, experts = draw(st.integers(0, 24)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    chosen = torch.rand(tokens, experts, generator=generator) < density
    weights = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    return chosen, weights


@settings(max_examples=60, deadline=None)
@given(maps())
def test_rows_are_the_maps_pairs_sorted_by_expert_then_token(given_map):
    chosen, weights = given_map
    routing = Routing(chosen, weights)
    expected = [
        (expert, token)
        for expert in range(chosen.shape[1])
        for token in range(chosen.shape[0])
        if chosen[token, expert]
    ]
    rows = list(zip(routing.experts.tolist(), routing.tokens.tolist(), strict=True))
    assert rows == expected
    assert routing.rows == len(expected)
    assert routing.weights.tolist() == [weights[token, expert] for expert, token in expected]
    for whole in (routing.tokens, routing.experts, routing.counts, routing.k):
        assert whole.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(maps())
def test_counts_and_k_are_the_maps_margins(given_map):
    chosen, weights = given_map
    routing = Routing(chosen, weights)
    assert routing.counts.equal(chosen.sum(0))
    assert routing.k.equal(chosen.sum(1))
    assert int(routing.counts.sum()) == int(routing.k.sum()) == routing.rows
    # each expert's rows are one slice, given by the counts alone
    starts = routing.counts.cumsum(0) - routing.counts
    for expert, (start, count) in enumerate(zip(starts, routing.counts, strict=True)):
        assert (routing.experts[start : start + count] == expert).all()


@settings(max_examples=60, deadline=None)
@given(maps(), st.integers(0, 2**31))
def test_the_gradient_of_the_weights_is_that_of_a_dense_gather(given_map, seed):
    chosen, weights = given_map
    sparse = weights.clone().requires_grad_()
    dense = weights.clone().requires_grad_()
    routing = Routing(chosen, sparse)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(routing.rows, generator=generator, dtype=torch.float64)
    (routing.weights * upstream).sum().backward()
    (dense[routing.tokens, routing.experts] * upstream).sum().backward()
    assert sparse.grad is not None
    assert sparse.grad.equal(dense.grad if dense.grad is not None else torch.zeros_like(dense))
    assert not sparse.grad[~chosen].any()


@settings(max_examples=30, deadline=None)
@given(maps())
def test_the_map_can_be_rebuilt_and_is_left_alone(given_map):
    chosen, weights = given_map
    before = chosen.clone()
    routing = Routing(chosen, weights)
    rebuilt = torch.zeros_like(chosen)
    rebuilt[routing.tokens, routing.experts] = True
    assert rebuilt.equal(before)
    assert chosen.equal(before)


def test_a_transposed_view_is_read_as_it_is_indexed():
    chosen = torch.tensor([[True, False, True], [True, True, False]]).t()
    routing = Routing(chosen, torch.arange(6.0).view(2, 3).t())
    assert routing.experts.tolist() == [0, 0, 1, 1]
    assert routing.tokens.tolist() == [0, 2, 0, 1]
    assert routing.weights.tolist() == [0, 2, 3, 4]


def test_losses_belong_to_one_routing():
    chosen = torch.ones(2, 2, dtype=torch.bool)
    first = Routing(chosen, torch.ones(2, 2))
    first.losses["z"] = torch.ones(())
    assert Routing(chosen, torch.ones(2, 2)).losses == {}
    given_losses = {"balance": torch.ones(())}
    assert Routing(chosen, torch.ones(2, 2), given_losses).losses is given_losses


@pytest.mark.parametrize(
    ("chosen", "weights"), [((3, 2), (2, 3)), ((3,), (3,)), ((1, 3, 2), (1, 3, 2))]
)
def test_shapes_that_do_not_fit_are_refused(chosen, weights):
    with pytest.raises(RequestError, match=r"\(tokens, experts\)"):
        Routing(torch.ones(chosen, dtype=torch.bool), torch.ones(weights))
