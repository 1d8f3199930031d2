"""What each of two gloo ranks does: a script of test_cowclip_ranks."""

from __future__ import annotations

import sys

import torch
from clicks import Model, batch, loss_of
from torch.nn.parallel import DistributedDataParallel

import forked
from sparing.core import ranks
from sparing.core.clock import Clock
from sparing.core.method import Setup
from sparing.updates.cowclip import CowClip
from sparing.updates.rowwise import RowWise

OPTIONS = {"ratio": 0.001, "bound": 1e-5}
CASES = [
    ("host, dense", {"reduce": "host"}, False),
    ("host, passes", {"reduce": "host", "mode": "dense"}, False),
    ("host, sparse", {"reduce": "host"}, True),
    ("rows, dense", {"reduce": "rows"}, False),
    ("rows, sparse", {"reduce": "rows"}, True),
]
DECAYED = {"linear": True, "table_rule": "rowwise-adamw", "table_decay": 0.3}
LATE = [
    ("host, lazy", {"reduce": "host", "mode": "lazy", **DECAYED}, True),
    ("rows, lazy", {"reduce": "rows", "mode": "lazy", **DECAYED}, True),
]


def trained(options: dict[str, object], sparse: bool, rank: int | None) -> torch.nn.Module:
    """Three steps of two micro-batches each; rank None has the batches of both ranks."""
    # ranks that were initialised differently hold rank 0's values after DDP, or our own broadcast
    model = Model(seed=rank or 0, sparse=sparse)
    method = CowClip(**OPTIONS, **options)
    world = 1 if rank is None else 2
    method.prepare(model, Setup(world_size=world))
    wrapped = model if rank is None else DistributedDataParallel(model)
    method.bind(model=model)
    groups = method.optimizer(model, [{"params": list(model.parameters())}])
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if "table_rule" in options:
        optimizer = RowWise(groups, lr=0.05)
    clock = Clock()
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            whole = batch(16, 10 * step + part)
            ids, labels = (t if rank is None else t[rank * 8 : rank * 8 + 8] for t in whole)
            (loss_of(wrapped, ids, labels) / 2).backward()
        method.grads(model.named_parameters(), None)
        optimizer.step()
        clock.step += 1
        method.step(clock, optimizer)
    assert method.signals()["clipped"] > 0
    if rank is not None:
        ranks.agree("what was noted", repr(method.signals()))
        of_method = {f"{table.name}.weight" for table in method.tables}
        for name, tensor in model.state_dict().items():
            if name in of_method or options["reduce"] == "host":
                ranks.agree(name, tensor)
    return model


def work(rank: int) -> None:
    torch.sparse.check_sparse_tensor_invariants.disable()
    for name, options, sparse in CASES + LATE:
        found = trained(options, sparse, rank)
        torch.save(found.state_dict(), f"{sys.argv[2]}-{name}-{rank}")


if __name__ == "__main__":
    forked.ranks(work, sys.argv[1])
