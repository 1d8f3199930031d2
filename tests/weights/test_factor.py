"""A factor: dense until it is masked, then nothing but its kept values."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparing.core.errors import RequestError, RunError
from sparing.weights.factor import Factor


def random_mask(out: int, width: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(out, width, generator=torch.Generator().manual_seed(seed)) < share


def masked(seed: int = 0, out: int = 5, width: int = 7, share: float = 0.4) -> Factor:
    generator = torch.Generator().manual_seed(seed)
    factor = Factor(torch.randn(out, width, dtype=torch.float64, generator=generator))
    factor.keep_(random_mask(out, width, share, seed))
    return factor


@given(
    out=st.integers(1, 9), width=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_a_masked_factor_is_the_masked_matrix(out, width, share, seed):
    dense = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    mask = random_mask(out, width, share, seed)
    factor = Factor(dense)
    assert factor.matrix().equal(dense)
    values = factor.values
    factor.keep_(mask)
    assert factor.values is values  # an optimizer that holds it holds the right one
    assert factor.matrix().equal(dense * mask)
    assert factor.mask().equal(mask)
    assert factor.kept == int(mask.sum()) == factor.values.numel()
    assert factor.size == out * width


def test_gradients_reach_the_kept_values_only():
    factor = masked()
    mask = factor.mask()
    weight = torch.randn(5, 7, dtype=torch.float64)
    (factor() * weight).sum().backward()
    assert factor.values.grad is not None
    assert factor.values.grad.equal(weight[mask])
    assert torch.autograd.gradcheck(lambda _: factor() ** 2, (factor.values,))
    assert torch.autograd.gradgradcheck(lambda _: factor() ** 3, (factor.values,))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_what_is_masked_stays_zero_under_weight_decay_and_has_no_state(optimizer):
    factor = masked()
    mask = factor.mask()
    chosen = optimizer(factor.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(1000):
        chosen.zero_grad()
        ((factor() - step % 7) ** 2).sum().backward()
        chosen.step()
    assert int((factor()[~mask] != 0).sum()) == 0
    for state in chosen.state.values():
        for value in state.values():
            assert not isinstance(value, torch.Tensor) or value.numel() in (1, factor.kept)


def test_masking_again_takes_only_parts_of_what_is_left():
    factor = masked()
    first = factor.mask()
    smaller = first & random_mask(5, 7, 0.5, 3)
    before = factor().detach()
    factor.keep_(smaller)
    assert factor().equal(before * smaller)
    with pytest.raises(RequestError, match="dropped before"):
        factor.keep_(first)


def test_nothing_and_all_can_be_kept():
    factor = Factor(torch.ones(2, 3))
    factor.keep_(torch.ones(2, 3, dtype=torch.bool))
    assert factor().equal(torch.ones(2, 3))
    factor.keep_(torch.zeros(2, 3, dtype=torch.bool))
    assert factor.kept == 0
    assert factor().equal(torch.zeros(2, 3))
    factor().sum().backward()


def test_whole_units_leave_a_smaller_dense_matrix():
    dense = torch.arange(12.0).view(3, 4)
    factor = Factor(dense)
    factor.keep_units_(torch.tensor([0, 2]), 0)
    assert factor().equal(dense[[0, 2]])
    factor.keep_units_(torch.tensor([1]), 1)
    assert factor().equal(dense[[0, 2]][:, [1]])
    assert factor.index is None
    assert factor.shape == (2, 1)
    factor.keep_(torch.tensor([[True], [False]]))
    with pytest.raises(RequestError, match="before single entries"):
        factor.keep_units_(torch.tensor([0]), 0)


def test_copies_pickles_types_and_states():
    factor = masked()
    for clone in (copy.deepcopy(factor), pickle.loads(pickle.dumps(factor))):
        assert clone().equal(factor())
        clone.values.data.zero_()
    assert factor().abs().sum() > 0
    half = copy.deepcopy(factor).to(torch.bfloat16)
    assert half().dtype == torch.bfloat16
    assert half.mask().equal(factor.mask())
    assert half.index is not None
    assert half.index.dtype == torch.int64


def test_a_state_dict_brings_its_mask_whatever_was_there():
    source = masked(1)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state["bits"].numel() == 5  # 35 entries in 5 bytes
    for target in (Factor(torch.zeros(5, 7, dtype=torch.float64)), masked(2)):
        values = target.values
        target.load_state_dict(state)
        assert target().equal(source())
        assert target.values is values
    target.load_state_dict(Factor(torch.ones(5, 7, dtype=torch.float64)).state_dict())
    assert target().equal(torch.ones(5, 7, dtype=torch.float64))


def test_a_state_dict_that_contradicts_itself_is_refused():
    state = masked(1).state_dict()
    with pytest.raises(RunError, match="keeps"):
        masked(2).load_state_dict({**state, "values": state["values"][:-1]})
    with pytest.raises(RunError, match="bytes"):
        masked(2).load_state_dict({**state, "bits": state["bits"][:-1]})


def test_wrong_masks_and_matrices_are_refused():
    factor = Factor(torch.ones(2, 3))
    for mask in (torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(RequestError, match=r"bool of shape \(2, 3\)"):
            factor.keep_(mask)
    for dense in (torch.ones(3), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(RequestError, match="floating point matrix"):
            Factor(dense)


def test_it_is_one_parameter():
    assert [name for name, _ in nn.Sequential(masked()).named_parameters()] == ["0.values"]
