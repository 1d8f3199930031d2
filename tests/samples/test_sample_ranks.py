"""Gloo ranks with really different losses."""

from __future__ import annotations

from pathlib import Path

import torch
from resume_worker import sampler, train

import forked

HERE = Path(__file__).parent


def test_two_ranks_hold_the_same_scores_and_plans(tmp_path):
    forked.script(HERE / "rank_worker.py", tmp_path / "store")


def test_four_ranks_go_on_in_the_epoch_that_one_began(tmp_path):
    alone = sampler(shard=True)
    for epoch in range(3):
        alone.set_epoch(epoch)
        train(alone)
    alone.set_epoch(3)
    begun = train(alone, batches=6)
    assert begun == alone.selection.index[:12].tolist()
    torch.save(alone.state_dict(), tmp_path / "state")
    forked.script(HERE / "resume_worker.py", tmp_path / "store", tmp_path / "state", len(begun))
