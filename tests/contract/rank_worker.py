"""What each gloo rank does: trains every method on its own data; run as a script by the test."""

from __future__ import annotations

import sys

from loop import CASES, Loop

import forked
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
    forked.ranks(work, sys.argv[1])
