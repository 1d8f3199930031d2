"""What each of two gloo ranks does: a script of test_sample_ranks."""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

import forked
import sparing
from sparing.core import ranks
from sparing.samples.scores import MODES, ScoreTable

N = 50


def tables(rank: int) -> None:
    """Ranks see other samples, in other numbers, with other losses; some ids are above 2^24."""
    for mode in MODES:
        first = 2**24 if mode == "last" else 20
        table, alone = (ScoreTable(first + 10, mode) for _ in range(2))
        seen = {0: [first + 1, 7, 9], 1: [first + 3]}
        for turn in range(3):
            for who, ids in seen.items():
                right = (torch.arange(len(ids)) + turn + who) % 2
                losses = right.float() if mode == "forgetting" else right * 0.3 + who + turn * 0.1
                alone.update_(torch.tensor(ids), losses)
                if who == rank:
                    table.update_(torch.tensor(ids), losses)
            if turn == 1:
                table.merge_()
        table.update_(torch.tensor([11]), torch.tensor([float("nan")]))
        table.merge_()
        for name in table._columns:
            got, expected = (torch.from_numpy(t.column(name)) for t in (table, alone))
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
            ranks.agree(f"{mode} {name}", got)
        assert table.rejected == 2
    table = ScoreTable(4)  # both saw sample 1, and one saw nothing else
    table.update_(torch.tensor([1]), torch.tensor([float(rank)]))
    table.merge_()
    assert table.value[1] == 1.0


def sharded(rank: int) -> None:
    """A plain DataLoader under torchrun: each sample once, all ranks plan alike."""
    sampler = sparing.InfoBatch(ratio=0.5, size=N, epochs=8, shard=True)
    data = sparing.indexed(TensorDataset(torch.arange(N).float()))
    loader = DataLoader(data, sampler=sampler, batch_size=4)
    for epoch in range(8):
        sampler.set_epoch(epoch)
        ranks.agree("the plan", torch.from_numpy(sampler.selection.index))
        ids = []
        for index, x in loader:
            assert index.tolist() == x.long().tolist()
            sampler.loss((x * 0.1 + 0.1).requires_grad_(), index)
            ids += index.tolist()
        each = ranks.gather(ids)
        assert len(each[0]) == len(each[1]) == len(sampler.selection) // 2 == len(sampler)
        assert not set(each[0]) & set(each[1])
    lengths = sampler.lengths()
    assert lengths[0] == lengths[7] == N > max(lengths[1:7])
    assert ranks.gather(lengths)[0] == ranks.gather(lengths)[1]


def accelerated(rank: int) -> None:
    """Accelerate looks one batch ahead, deals batches out and counts epochs itself."""
    from accelerate import Accelerator

    sampler = sparing.InfoBatch(ratio=0.5, delta=0.75, size=N, epochs=4)
    data = sparing.indexed(TensorDataset(torch.arange(N).float()))
    loader = Accelerator(cpu=True).prepare(DataLoader(data, sampler=sampler, batch_size=4))
    for epoch in range(4):
        sampler.set_epoch(epoch)
        ids = []
        for index, x in loader:
            assert index.tolist() == x.long().tolist()
            sampler.loss((x * 0.1 + 0.1).requires_grad_(), index)
            ids += index.tolist()
        both = set(ranks.gather(ids)[0]) | set(ranks.gather(ids)[1])
        assert both == set(sampler.selection.index.tolist())
        ranks.agree("the plan", torch.from_numpy(sampler.selection.index))
    assert sampler.lengths()[0] == sampler.lengths()[3] == N > sampler.lengths()[1]


def work(rank: int) -> None:
    tables(rank)
    sharded(rank)
    accelerated(rank)


if __name__ == "__main__":
    import accelerate  # noqa: F401  both forks need it

    forked.ranks(work, sys.argv[1])
