"""What each of two gloo ranks does: a script of test_session_ranks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from toys import (
    Recorder,
    Rows,
    Whole,
    language_session,
    linear,
    llama,
    restless,
    session,
    train,
)

import forked
from sparing.core import ranks
from sparing.core.errors import RunError
from sparing.core.method import Plan


def plain(rank: int, path: str) -> None:
    """DDP over both ranks is one rank with the whole batch."""
    recorder = Recorder()
    options = {"model": linear(), "data": Whole(11), "accumulate": 2, "epochs": 2, "clip": 1.0}
    whole = session(recorder, **options)
    assert isinstance(whole.model, DistributedDataParallel)
    assert recorder.setup.world_size == 2
    assert recorder.bound["model"] is whole.unwrapped is whole.model.module
    seen: list[int] = []
    for batch, context in whole:
        assert batch["x"][:, 0].tolist() == context.index[:, 0].tolist()
        seen += context.index[:, 0].tolist()
        losses, outputs = whole.forward(batch)
        whole.step(losses, context, outputs)
    shares = ranks.gather(seen)
    assert [len(share) for share in shares] == [10, 10]
    for epoch in range(2):
        both = {i for share in shares for i in share[epoch * 5 : epoch * 5 + 5]}
        assert len(both) == 10
    # 10 of 11 samples: 3 micro-batches of 2, 2 and 1 on each rank
    assert whole.clock.step == whole.clock.steps == 2 * 2
    assert whole.clock.samples == whole.clock.tokens == 20
    # gradients are reduced before the seam looks at them, whatever each rank's data
    ranks.agree("the norm of the gradients", recorder.norm)
    for name, tensor in whole.unwrapped.state_dict().items():
        ranks.agree(name, tensor)
    assert whole.ledger.spent("samples") == 10
    account = whole.account().to_dict()
    assert account["samples"] == {"spent": 20, "dense": 20}
    assert account["flops"]["spent"] == 20 * 2 * 3 * 2
    assert account["bytes"] == {"spent": 8, "dense": 16}
    assert account["parameters"] == {"spent": 4, "dense": 4}  # one model, however many ranks
    if rank == 0:
        torch.save(whole.unwrapped.state_dict(), path)

    mapped = session(data=Rows(), losses=None, batch_size=2)
    for batch, context in mapped:
        assert batch["x"][:, 0].tolist() == context.index[:, 0].tolist()
        mapped.step(mapped.model(batch["x"])[:, 0], context)
    assert mapped.clock.samples == 10


def experts() -> None:
    whole = language_session(restless(), accumulate=2, clip=1.0, steps=10, batch_size=2)
    events: list[dict[str, Any]] = []
    losses = train(whole, after=lambda: events.extend(whole.take_events()))
    different = ranks.gather(losses)
    assert different[0] != different[1], "both ranks saw the same data"
    assert events, "nothing was decided: the agreement shows nothing"
    ranks.agree("events", events)
    for name, tensor in whole.unwrapped.state_dict().items():
        ranks.agree(name, tensor)
    ranks.agree("signals", whole.signals())
    method = whole.methods[0].state_dict()["controller"]
    ranks.agree("history", method["history"])
    ranks.agree("the controller's generator", method["generator"])
    ranks.agree("tokens", whole.clock.tokens)
    assert whole.clock.tokens == 10 * 2 * 2 * 2 * 8
    each = ranks.gather(whole.ledger.spent("flops"))
    assert each[0] != each[1], "routed rows are counted where they were routed"
    assert whole.account().spent("flops") == sum(each)
    probes = ranks.gather(float(whole._probe()))
    assert probes[0] == probes[1]


def disagreement(rank: int) -> None:
    class Own(Recorder):
        def order(self, clock: Any) -> Plan:
            return Plan(torch.arange(4) + rank)

    with pytest.raises(RunError, match="do not agree on the plan of the epoch"):
        next(iter(session(Own())))


def empty() -> None:
    def one(epoch: int, generator: torch.Generator) -> Tensor:
        return torch.tensor([0])

    with pytest.raises(RunError, match="has 1 samples for 2 ranks"):
        next(iter(session(order=one, steps=2)))


def work(rank: int) -> None:
    plain(rank, sys.argv[2])
    experts()
    disagreement(rank)
    empty()


if __name__ == "__main__":
    import accelerate  # noqa: F401  both forks need it

    llama()
    forked.ranks(work, sys.argv[1])
