from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.weights.dynamic import rigl_step, set_step, share_at


def drawn(seed: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A mask, a weight that is zero outside it, and a dense gradient; with many ties."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    weight = torch.randint(-3, 4, mask.shape, generator=generator).to(dtype) * mask
    return mask, weight, torch.randint(-3, 4, mask.shape, generator=generator).to(dtype)


cases = (st.integers(0, 9), st.integers(1, 6), st.integers(1, 8), st.floats(0, 1))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@given(*cases, dtypes, st.booleans())
def test_a_step_keeps_the_count_and_moves_the_share(seed, rows, columns, share, dtype, by_gradient):
    mask, weight, gradient = drawn(seed, rows, columns, dtype)
    before = mask.clone()
    if by_gradient:
        move = rigl_step(mask, weight, gradient, share)
    else:
        move = set_step(mask, weight, share, torch.Generator().manual_seed(seed))
    kept, outside = int(mask.sum()), int((~mask).sum())
    moved = min(round(share * kept), outside)
    assert mask.equal(before)
    assert int(move.mask.sum()) == kept
    assert move.grown.numel() == moved
    assert move.grown.tolist() == sorted(set(move.grown.tolist()))
    assert bool(move.mask.reshape(-1)[move.grown].all())
    # what left had the least magnitudes
    stayed = move.mask.clone()
    stayed.reshape(-1)[move.grown] = False
    left = weight[mask & ~stayed].abs()
    assert left.numel() == moved
    if moved and bool(stayed.any()):
        assert float(left.max()) <= float(weight[stayed].abs().min())


@given(*cases)
def test_set_grows_only_what_was_outside(seed, rows, columns, share):
    mask, weight, _ = drawn(seed, rows, columns, torch.float32)
    move = set_step(mask, weight, share, torch.Generator().manual_seed(seed))
    assert not bool(mask.reshape(-1)[move.grown].any())
    again = set_step(mask, weight, share, torch.Generator().manual_seed(seed))
    assert again.mask.equal(move.mask)


@given(*cases)
def test_rigl_grows_the_largest_gradients_of_all_that_is_outside(seed, rows, columns, share):
    mask, weight, gradient = drawn(seed, rows, columns, torch.float32)
    move = rigl_step(mask, weight, gradient, share)
    size = gradient.abs().reshape(-1)
    rest = ~move.mask.reshape(-1)
    if move.grown.numel() and bool(rest.any()):
        assert float(size[move.grown].min()) >= float(size[rest].max())


def test_hand_made_steps():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    weight = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.0, 0.0]])
    gradient = torch.tensor([[0.0, 0.0, 0.0], [9.0, 1.0, 2.0]])
    move = rigl_step(mask, weight, gradient, 0.5)
    # 0.5 and -1 leave; the first comes back for its gradient, as in the paper
    assert move.grown.tolist() == [3, 5]
    assert move.mask.tolist() == [[True, False, True], [True, False, True]]
    move = set_step(mask, weight, 0.5, torch.Generator().manual_seed(0))
    assert move.grown.tolist() == [4, 5]
    assert move.mask.tolist() == [[True, False, True], [False, True, True]]


def test_set_draws_uniformly():
    mask = torch.tensor([True] + [False] * 4)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(2000):
        counts[set_step(mask, mask.float(), 1.0, generator).grown] += 1
    assert counts[0] == 0
    assert float((counts[1:] - 500).abs().max()) < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_the_share_falls_by_a_cosine():
    assert share_at(0, share=0.3, end=100) == pytest.approx(0.3)
    assert share_at(50, share=0.3, end=100) == pytest.approx(0.15)
    assert share_at(100, share=0.3, end=100) == 0
    assert share_at(500, share=0.3, end=100) == 0


def test_wrong_requests_are_refused():
    mask, weight = torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2)
    generator = torch.Generator()
    with pytest.raises(RequestError, match=r"share must be in \[0, 1\]"):
        set_step(mask, weight, 1.5, generator)
    with pytest.raises(RequestError, match=r"torch\.bool"):
        set_step(weight, weight, 0.5, generator)
    with pytest.raises(RequestError, match="the weight has shape"):
        set_step(mask, weight[:1], 0.5, generator)
    with pytest.raises(RequestError, match="the gradient has shape"):
        rigl_step(mask, weight, weight[:1], 0.5)
    with pytest.raises(RequestError, match="NaN"):
        set_step(mask, weight * float("nan"), 0.5, generator)
    with pytest.raises(RequestError, match="end must be at least 1"):
        share_at(0, share=0.3, end=0)
