"""What each of two gloo ranks does: run as a script by test_ranks."""

from __future__ import annotations

import sys

import pytest
import torch

import forked
from sparing.core import ranks
from sparing.core.errors import RunError


def work(rank: int) -> None:
    assert ranks.rank() == rank
    assert ranks.world_size() == 2
    assert ranks.distributed()

    # of mixed dtype, shape and layout, through one reduction
    counts = torch.tensor([2**52 + 1, rank])  # float32 would lose the 1
    share = torch.full((2, 3), 0.1 + rank)
    view = torch.zeros(4, 2).t()
    view += rank
    scalar = torch.tensor(3 + rank)
    weight = torch.full((2,), 1.0 + rank, requires_grad=True)
    half = torch.tensor([1.5], dtype=torch.bfloat16)
    ranks.sum_([counts, share, view, scalar, weight, half, torch.empty(0)])
    assert counts.tolist() == [2**53 + 2, 1]
    assert share.equal(torch.full((2, 3), 0.1, dtype=torch.float32).double().add(
        torch.full((2, 3), 1.1).double()
    ).float())  # fmt: skip
    assert view.eq(1).all()
    assert view.shape == (2, 4)
    assert scalar.item() == 7
    assert weight.tolist() == [3.0, 3.0]
    assert half.item() == 3.0

    # sums of different data are the same bits on both
    data = torch.randn(1000, generator=torch.Generator().manual_seed(rank))
    ranks.sum_([data])
    ranks.agree("the sum", data)

    mean = torch.tensor([1.0, 2.0]) * (1 + 2 * rank)
    ranks.mean_([mean])
    assert mean.tolist() == [2.0, 4.0]

    odd = torch.tensor([True, False, bool(rank)])  # three bytes: the next is not aligned
    big = torch.tensor([2**62 + 1 + rank])
    state = torch.Generator().manual_seed(rank).get_state()
    turned = torch.full((2, 3), float(rank)).t()
    nan = torch.tensor(float("nan") if rank == 0 else 0.0)
    ranks.broadcast_([odd, big, state, turned, nan, torch.empty(0)])
    assert odd.tolist() == [True, False, False]
    assert big.item() == 2**62 + 1
    assert state.equal(torch.Generator().manual_seed(0).get_state())
    assert turned.eq(0).all()
    assert nan.isnan()

    ranks.agree("the recipe", {"seed": 3})
    for value, part in (
        (rank, "rank 0: 0; rank 1: 1"),
        (torch.full((3,), rank), "rank 0: torch.int64 of shape (3,), sha256"),
        ("x" * 500 + str(rank), "..., sha256"),
    ):
        with pytest.raises(RunError, match="do not agree on the seed") as caught:
            ranks.agree("the seed", value)
        assert part in str(caught.value)
    # all ranks failed alike, so they can go on together
    ranks.agree("the end", "x" * 500)


if __name__ == "__main__":
    forked.ranks(work, sys.argv[1])
