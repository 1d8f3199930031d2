"""What each of two gloo ranks does: trains with moving weights on its own losses."""

from __future__ import annotations

import sys

import torch
from test_mix import MOVING, gated, losses, session, train

import forked
import sparing
from sparing.core import ranks


def work(rank: int) -> None:
    def uneven(model, batch):
        each, outputs = losses(model, batch)
        return each * (1 + 3 * rank), outputs

    cases = [
        (session, sparing.Mix(**MOVING)),
        (session, sparing.Mix(**(MOVING | {"losses": "probe", "probe_samples": 5}))),
        (session, sparing.Mix(rule="random", every=4)),
        (gated, sparing.Mix(rule="gate-load", every=6, probe_samples=7)),
        (session, sparing.Mix(rule="gate-load", every=6, measure=lambda net: {
            "loads": torch.eye(3) + torch.rand(3, 3, generator=torch.Generator().manual_seed(rank))
        })),
    ]  # fmt: skip
    for build, method in cases:
        whole = build(method, losses=uneven, epochs=2)
        came = train(whole)
        parts = ranks.gather(came)
        assert len(set(map(len, parts))) == 1
        ranks.agree(f"{method}: weights", method.weights)
        ranks.agree(f"{method}: plan", torch.from_numpy(method._plan))
        ranks.agree(f"{method}: losses", method.losses.latest)
        assert method.ticks >= 2
        # what came on both ranks together is the plan
        last = len(method._plan)
        both = sorted(parts[0][-last // 2 :] + parts[1][-last // 2 :])
        assert both == sorted(method._plan.tolist())
    print("done")


if __name__ == "__main__":
    forked.ranks(work, sys.argv[1])
