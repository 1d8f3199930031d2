"""What is claimed of sparse adapters, checked on the runs of the comparison on AG News.

1. Removing 40 % of an adapter's entries costs nothing: each score at 0.6 against the dense adapter.
2. Large and sparse beats dense at the same budget: twice the width at half the share.
3. A score is worth more than chance: SNIP against random entries, at 0.6 and 0.2.
4. Convergence is at least 25 % faster: the first step at which the training loss, a mean of
   ten steps, is down to where the dense adapter of the same seed ends, as a share of all steps. Who
   never comes there counts as 1.

Verdicts are from two one-sided tests, seed by seed. And what each arm trains and stores.

    python benchmarks/adapters_comparison.py                          # makes the runs
    python benchmarks/adapters_claims.py --runs runs/adapters_comparison

Writes benchmarks/records/adapters_claims.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import sparing
from comparing import everything
from record import write
from sparing.run.compare.found import Found
from sparing.run.compare.intervals import paired_interval
from sparing.run.compare.statistics import judge, parse_margin

DENSE, LARGE, SMOOTHED = "dense adapter", "large-sparse", 10
CHOICE = {"snip 0.6": "random 0.6", "snip 0.2": "random 0.2"}
FASTER = 0.75


def against(arm: Mapping[int, float], other: Mapping[int, float], margin: Any) -> dict[str, Any]:
    """Two arms' accuracies, the difference over the seeds that both have, and a verdict."""
    shared = sorted(set(arm) & set(other))
    told: dict[str, Any] = {"seeds": len(shared)}
    if len(shared) < 2:
        return told
    found = judge({s: arm[s] for s in shared}, {s: other[s] for s in shared}, margin=margin)
    told |= {
        "mean": round(found.mean_arm, 3),
        "other": round(found.mean_baseline, 3),
        "verdict": found.verdict,
    }
    if found.paired is not None:
        told["difference"] = round(found.paired.estimate, 3)
        told["interval, 95 %"] = [round(found.paired.low, 3), round(found.paired.high, 3)]
    return told


def smoothed(run: Found) -> np.ndarray:
    """The training loss after each step, the mean of the last ten: (steps,)."""
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [entry for line in lines if "loss" in (entry := json.loads(line))]
    losses = np.array([entry["loss"] for entry in logged if entry.get("kind") == "train"])
    width = min(SMOOTHED, len(losses))
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def convergence(found: sparing.Comparison) -> dict[str, Any]:
    """By arm the share of the steps after which it is where the dense adapter ends."""
    ends = {run.seed: float(smoothed(run)[-1]) for run in found.arm(DENSE).finished}
    told: dict[str, Any] = {}
    for arm in found.arms:
        shares = []
        for run in arm.finished:
            if run.seed in ends:
                there = np.flatnonzero(smoothed(run) <= ends[run.seed])
                steps = int(run.summary["steps"])
                shares.append((int(there[0]) + SMOOTHED) / steps if there.size else 1.0)
        if len(shares) < 2:
            continue
        over = paired_interval(np.array(shares), 0.95)
        told[arm.name] = {
            "share of the steps": round(over.estimate, 3),
            "interval, 95 %": [round(over.low, 3), round(over.high, 3)],
            "at least 25 % faster": over.high <= FASTER,
        }
    return told


def sizes(found: sparing.Comparison) -> dict[str, Any]:
    """What each arm trains, and the bytes that it stores beside the base; means over its seeds."""
    told: dict[str, Any] = {}
    for arm in found.arms:
        row: dict[str, Any] = {"trained": arm.costs.get("parameters")}
        for run in arm.finished[:1]:
            for signals in run.summary.get("methods", {}).values():
                row["stored bytes"] = signals.get("stored_bytes")
        told[arm.name] = row
    return told


def main() -> None:
    """Check the claims on finished runs and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/adapters_comparison"))
    parser.add_argument("--margin", default="+-1 accuracy")
    given = parser.parse_args()
    found = everything(given.runs, "adapters-text", "agnews", DENSE, given.margin)
    limit = parse_margin(given.margin, found.metric, found.higher_is_better)
    arms = {arm.name: arm.values for arm in found.arms if arm.values}
    dense = arms[DENSE]
    others = [name for name in arms if name not in (DENSE, LARGE)]
    results: dict[str, Any] = {
        "margin": given.margin,
        "against the dense adapter": {n: against(arms[n], dense, limit) for n in others},
        "chosen against chance": {
            f"{one} against {other}": against(arms[one], arms[other], limit)
            for one, other in CHOICE.items()
            if one in arms and other in arms
        },
        "convergence": convergence(found),
        "sizes": sizes(found),
    }
    if LARGE in arms:
        results["large and sparse against dense"] = against(arms[LARGE], dense, limit)
    seeds = sorted({seed for values in arms.values() for seed in values})
    note = f"runs of the record adapters_comparison; package {found.code[:12]}"
    print(write("adapters_claims", results, seeds=seeds, note=note))


if __name__ == "__main__":
    main()
