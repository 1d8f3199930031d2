from __future__ import annotations

from pathlib import Path

import torch
from toys import SGD, Whole, linear, squares

import forked


def test_two_ranks_through_accelerate(tmp_path):
    worker = Path(__file__).with_name("session_worker.py")
    forked.script(worker, tmp_path / "store", tmp_path / "model")
    # the same on one rank, in groups of two micro-batches over both ranks
    model, data = linear(), Whole(11)
    optimizer = SGD(model.parameters())
    for epoch in range(2):
        order = torch.randperm(11, generator=torch.Generator().manual_seed(epoch))[:10]
        for group in order[:8], order[8:]:
            optimizer.zero_grad()
            squares(model, data.batch(group))[0].mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    found = torch.load(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor)
