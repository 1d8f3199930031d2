from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.sparse_gradients import coalesced


def made(ids: list[int], rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(len(ids))
    values = torch.randn(len(ids), width, generator=draw, dtype=torch.float64).to(dtype)
    where = torch.tensor(ids, dtype=torch.int64)[None]
    return torch.sparse_coo_tensor(where, values, (rows, width), check_invariants=True)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 30), max_size=80),
    st.integers(1, 5),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_rows_add_up_as_torch_has_them(ids, width, dtype):
    grad = made(ids, 31, width, dtype)
    found, expected = coalesced(grad), grad.coalesce()
    assert found.is_coalesced()
    assert found.indices().equal(expected.indices())
    torch.testing.assert_close(found.values(), expected.values())
    if len(ids) > 1:  # what was given stays as it was; fewer are in order as they are
        assert not grad.is_coalesced()


def test_entries_of_a_row_are_added_in_their_order():
    grad = made([7] * 50 + [3] * 50, 9, 4, torch.float32)
    one, two = torch.zeros(4), torch.zeros(4)
    for value in grad._values()[50:]:
        one += value
    for value in grad._values()[:50]:
        two += value
    assert coalesced(grad).values().equal(torch.stack([one, two]))


@pytest.mark.parametrize("rows", [2**31 - 1, 2**31 + 5, 2**40])
def test_rows_with_huge_ids(rows):
    found = coalesced(made([rows - 1, 2, rows - 1], rows, 2, torch.float32))
    assert found.indices().tolist() == [[2, rows - 1]]


def test_what_is_not_finite_stays_so():
    grad = made([1, 1, 0], 3, 2, torch.float32)
    grad._values()[0] = torch.tensor([torch.nan, torch.inf])
    value = coalesced(grad).values()[1]
    assert value[0].isnan()
    assert value[1].isinf()
    assert coalesced(grad).values()[0].isfinite().all()


def test_a_gradient_of_one_rank_without_rows():
    grad = made([], 5, 3, torch.float32)
    assert coalesced(grad)._values().shape == (0, 3)
