"""What each gloo rank does: data-parallel training with its own data and a controller."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from planted import Run

from sparing.core import ranks
from sparing.experts.controller import ControllerOptions
from sparing.experts.frozen_slots import moments, slot_parameters

UPDATES = 50


def work(rank: int, published: bool) -> None:
    options = {"every": 2, "warmup": 2, "trial": 1, "patience": 1, "longest_wait": 2}
    run = Run(
        start=2,
        slots=6,
        dim=8,
        size=32,
        lr=1e-2,
        router={"published": True} if published else {"target_k": 1.0},
        adapt=ControllerOptions(**options, output_tolerance=0.1, loss_tolerance=0.05),
    )
    # from here on each rank has its own data, held-out data too
    run.generator.manual_seed(1000 + rank)
    run.held = run.data.batch(64, torch.Generator().manual_seed(2000 + rank))
    loads = []
    for step in range(1, 2 * UPDATES + 1):
        run.backward()
        loads.append(run.layer.record.load.clone())
        ranks.mean_(
            [p.grad for p in run.layer.parameters() if p.requires_grad and p.grad is not None]
        )
        run.optimizer.step()
        run.events += run.controller.step(step, run.optimizer, probe=run.probe)
    assert run.controller.updates == UPDATES
    kinds = {event["kind"] for event in run.events}
    assert kinds >= ({"expert added"} if published else {"expert added", "expert removed"})

    seen: list[list[torch.Tensor]] = [[] for _ in range(ranks.world_size())]
    dist.all_gather_object(seen, loads)
    for other in range(ranks.world_size()):
        same = all(a.equal(b) for a, b in zip(seen[other], loads, strict=True))
        assert same == (other == rank), "the ranks were to have different data"

    ranks.agree("the events", run.events)
    ranks.agree("the history", str(run.controller.history.to_dict()))
    state = run.layer.state_dict()
    assert {"router.similarity", "router.threshold", "router.active"} <= set(state)
    for name, value in state.items():
        ranks.agree(name, value)
    for parameter in slot_parameters(run.layer):
        for name, value in moments(run.optimizer, parameter).items():
            ranks.agree(name, value)
    loads_of_all = torch.tensor(run.controller.history.layers["layer"]["load"])
    assert loads_of_all.sum() == sum(load.sum() for rank in seen for load in rank)


if __name__ == "__main__":
    torch.set_num_threads(1)
    number, count = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[3]}",
        rank=number,
        world_size=count,
        timeout=timedelta(seconds=100),
    )
    work(number, sys.argv[4] == "published")
    dist.barrier()  # neither goes while another may still read from it
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads, where they are still ending, can abort an interpreter that ends
