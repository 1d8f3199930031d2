"""Weights at constant loads, published and anchored; and what a tick and a step of mixing cost.

    python benchmarks/mixing.py

A tick plans what is left of the epoch anew, so it is timed at five places of it; planning of a
whole epoch is their mean times the ticks of 100 steps of 32 samples. Times are of the process's
CPU, so that other load on the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import sparing
from record import spread, write
from sparing.core.clock import Clock
from sparing.samples.mixing_weights import bounds, differences, raised

EVERY, BATCH = 100, 32
"""Optimizer steps between ticks, and samples of a step, in the epoch whose planning is summed."""
LOADS = [[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]]
ETA, FLOOR, UPDATES = 10.0, 0.05, 20


def runaway() -> dict[str, Any]:
    """Weights after the updates of the published schedule, at loads that never change."""
    apart = differences(torch.tensor(LOADS, dtype=torch.float64))
    start = torch.full((3,), 1 / 3, dtype=torch.float64)
    published, anchored = start, start
    for _ in range(UPDATES):
        published = raised(published, apart, ETA, FLOOR)
        anchored = raised(start, apart, ETA, FLOOR)
    return {
        "updates": UPDATES,
        "published": [round(w, 4) for w in published.tolist()],
        "anchored": [round(w, 4) for w in anchored.tolist()],
        "largest published": round(float(published.max()), 4),
        "largest anchored": round(float(anchored.max()), 4),
        "no anchored weight can pass": round(float(bounds(start, ETA, FLOOR)[1].max()), 4),
        "anchored after 1 update and after all are equal": bool(
            torch.equal(anchored, raised(start, apart, ETA, FLOOR))
        ),
    }


def cpu(function: Callable[[], Any], repetitions: int) -> dict[str, float]:
    found = []
    for _ in range(repetitions):
        begun = time.process_time()
        function()
        found.append(time.process_time() - begun)
    return spread(found)


def costs(size: int, repetitions: int) -> dict[str, Any]:
    """A tick at five places of an epoch, beside a shuffle of as many ids."""
    source = torch.randint(8, (size,), generator=torch.Generator().manual_seed(0))
    mix = sparing.Mix(sources=source, rule="random", every=1)
    clock = Clock()
    mix.order(clock)
    losses, index = torch.rand(BATCH), torch.arange(BATCH)

    def tick(dealt: int) -> None:
        mix.step(Clock(step=1), None)
        mix.order(Clock(dealt=dealt))

    def notes() -> None:
        for _ in range(100):
            mix.loss(losses, index)

    places = {f"{done} %": size * done // 100 for done in (0, 25, 50, 75, 100)}
    ticks = {at: cpu(lambda d=dealt: tick(d), repetitions) for at, dealt in places.items()}  # type: ignore[misc]
    count = size // (EVERY * BATCH)
    planning = statistics.mean(times["median"] for times in ticks.values()) * count
    each = planning / size * 1e6
    return {
        "tick, with so much of the epoch dealt": ticks,
        "planning of an epoch": {
            "ticks": count,
            "seconds": round(planning, 3),
            "microseconds a sample": round(each, 2),
            "under 1 % where training takes a sample, microseconds": round(100 * each, 1),
        },
        "torch.randperm": cpu(lambda: torch.randperm(size), repetitions),
        "losses of 100 batches of 32": cpu(notes, repetitions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--try", dest="trying", action="store_true", help="write no record")
    asked = parser.parse_args()
    results: dict[str, Any] = {"constant loads": runaway()}
    for size in (60_000, 1_000_000):
        results[f"{size} samples"] = costs(size, asked.repetitions)
    for name, found in results.items():
        print(name, found)
    if not asked.trying:
        write("mixing", results, seeds=[0])


if __name__ == "__main__":
    main()
