"""What each gloo rank does: trains every method on its own data; run as a script by the test."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from loop import CASES, Loop

from sparing.core import ranks, registry


def work(rank: int) -> None:
    events = 0
    for name, cases in CASES.items():
        for options in cases:
            loop = Loop(registry.method(name)(**options), data_seed=100 + rank)
            loop.run(8)
            for key, tensor in loop.model.state_dict().items():
                ranks.agree(f"{name} {options}: {key}", tensor)
            ranks.agree(f"{name} {options}: events", loop.events)
            events += len(loop.events)
    assert events, "no case decided anything: the agreement shows nothing"
    print("events", events)


if __name__ == "__main__":
    number, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=number,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    work(number)
    dist.barrier()  # neither goes while another may still read from it
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads, where they are still ending, can abort an interpreter that ends
