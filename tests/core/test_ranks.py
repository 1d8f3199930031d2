from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import forked
from sparing.core import ranks


def test_alone_nothing_changes_and_all_agree():
    assert not dist.is_initialized()
    assert (ranks.rank(), ranks.world_size(), ranks.distributed()) == (0, 1, False)
    tensors = [torch.ones(2), torch.tensor(3), torch.tensor([True])]
    before = [tensor.clone() for tensor in tensors]
    ranks.sum_(tensors)
    ranks.mean_(tensors[:1])
    ranks.broadcast_(tensors)
    ranks.agree("anything", object())
    assert all(a.equal(b) for a, b in zip(tensors, before, strict=True))


def test_one_rank_of_a_group_is_alone_too(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert (ranks.rank(), ranks.world_size(), ranks.distributed()) == (0, 1, False)
        ranks.agree("anything", object())
    finally:
        dist.destroy_process_group()


def test_two_ranks_agree_bit_for_bit(tmp_path):
    forked.script(Path(__file__).with_name("rank_worker.py"), tmp_path / "store")
