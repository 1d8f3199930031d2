"""Planning an epoch: time and memory at two sizes, beside the released rule, and a step's calls.

    python benchmarks/planning.py [--huge]

``--huge`` plans 100 million samples, which takes some GB of memory and a few seconds a time.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import numpy as np
import torch

import sparing
from record import in_turns, spread, summary, write
from sparing.samples import draw, infobatch

IMAGENET = 1_281_167
HUGE = 100_000_000
BATCH = 128
STEP = 0.014
"""Seconds of the training step that a method's calls are set against."""


def released(scores: torch.Tensor, random: np.random.RandomState) -> list[int]:
    """The published rule in the way that its code goes: numpy choice and Python lists of ids."""
    low = (scores < scores.mean()).numpy()
    below = np.where(low)[0]
    kept = np.where(~low)[0].tolist()
    kept.extend(random.choice(below, int(0.5 * len(below)), replace=False))
    random.shuffle(kept)
    return kept


def planning(size: int, repetitions: int, *, published: bool) -> dict[str, Any]:
    """Times of a plan with exact counts and a uniform shuffle, and bytes a sample above scores."""
    scores = draw.generator(0, 0).exponential(size=size).astype(np.float32)
    random = draw.generator(0, 1)
    code = np.ones(size, dtype=bool)
    functions: dict[str, Any] = {
        "plan": lambda: infobatch.plan(1, scores, random, ratio=0.5),
        "shuffle of all alone": lambda: draw.shuffled(code, random),
    }
    if published:
        tensor, old = torch.from_numpy(scores), np.random.RandomState(0)
        functions["released rule"] = lambda: released(tensor, old)
        functions["torch.randperm alone"] = lambda: torch.randperm(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = infobatch.plan(1, scores, random, ratio=0.5)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    times = in_turns(functions, repetitions=repetitions, warm_up=1)
    return {
        "kept": len(found),
        "growth of the process's peak memory, bytes a sample": round(peak / size, 2),
        "times": summary(times, "plan"),
    }


def calls(repetitions: int, steps: int = 400) -> dict[str, Any]:
    """CPU seconds of ``sampler.loss`` in a step, checks and flushes included, and of a mean."""
    sampler = sparing.InfoBatch(ratio=0.5, delta=1, size=IMAGENET)
    sampler.scores.value[:] = draw.generator(0, 0).exponential(size=IMAGENET)
    sampler.set_epoch(1)
    ids = torch.from_numpy(sampler.selection.index[: BATCH * steps].astype(np.int64))
    batches = list(ids.split(BATCH))
    losses = torch.rand(BATCH, requires_grad=True)
    with_it, plain = [], []
    for _ in range(repetitions):
        start = time.process_time()
        for batch in batches:
            sampler.loss(losses, batch)
        middle = time.process_time()
        for _batch in batches:
            losses.mean()
        with_it.append((middle - start) / steps)
        plain.append((time.process_time() - middle) / steps)
    extra = [a - b for a, b in zip(with_it, plain, strict=True)]
    return {
        "loss": spread(with_it, 8),
        "plain mean": spread(plain, 8),
        "share of a step of 14 ms, by the least": round(min(extra) / STEP, 5),
        "share of a step of 14 ms, by the median": round(sorted(extra)[len(extra) // 2] / STEP, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--huge", action="store_true", help="plan 100 million samples, too")
    asked = parser.parse_args()
    results: dict[str, Any] = {
        f"{IMAGENET} samples": planning(IMAGENET, asked.repetitions, published=True),
        "calls of a step": calls(asked.repetitions),
    }
    if asked.huge:
        results[f"{HUGE} samples"] = planning(HUGE, 1, published=False)
    for name, found in results.items():
        print(name, found)
    write("planning", results, seeds=[0])


if __name__ == "__main__":
    main()
