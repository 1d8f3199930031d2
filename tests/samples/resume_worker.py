"""What each of four gloo ranks does with an epoch that one rank began: a script."""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

import forked
import sparing
from sparing.core import ranks

N, EPOCHS = 50, 8


def sampler(shard: bool) -> sparing.InfoBatch:
    return sparing.InfoBatch(ratio=0.5, size=N, epochs=EPOCHS, shard=shard)


def train(sampler: sparing.InfoBatch, batches: int | None = None) -> list[int]:
    """The ids that were trained on, of what is left of the epoch or of some batches of it."""
    data = sparing.indexed(TensorDataset(torch.arange(N).float()))
    ids: list[int] = []
    for number, (index, x) in enumerate(DataLoader(data, sampler=sampler, batch_size=2)):
        if number == batches:
            break
        sampler.loss((x * 0.1 + 0.1).requires_grad_(), index)
        ids += index.tolist()
    return ids


def work(rank: int) -> None:
    resumed = sampler(shard=True)
    resumed.load_state_dict(torch.load(sys.argv[2], weights_only=False))
    plan = resumed.selection.index.tolist()
    ranks.agree("the plan", plan)
    assert resumed.epoch == 3
    done = int(sys.argv[3])
    each = ranks.gather(train(resumed))
    together = [index for part in each for index in part]
    assert len({len(part) for part in each}) == 1
    assert len(together) == len(set(together)) == (len(plan) - done) // 4 * 4
    assert set(together) <= set(plan[done:])
    resumed.set_epoch(4)
    ranks.agree("the next plan", resumed.selection.index.tolist())
    assert not resumed.scores.value[plan[done : done + 4]].tolist().count(float("nan"))


if __name__ == "__main__":
    forked.ranks(work, sys.argv[1], world=4)
