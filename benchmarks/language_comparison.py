"""DynMoE against what people would choose instead, on the language recipe, at equal tokens.

Arms: DynMoE corrected with and without a target for the mean k, and as published; top-k with
k = 1, 2, 4; dense, with the width that makes its ledger's FLOPs those of corrected DynMoE. Same
data order, model seed, optimizer and evaluation for each seed. Writes
benchmarks/records/language_comparison.json.

    python benchmarks/language_comparison.py --jobs 2 --threads 1

A run that is finished in --out is kept, an unfinished one is resumed; --finished runs nothing and
records the runs that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from record import write
from sparing.run import recipe as recipes
from sparing.run.plan import plan

RECIPE = "language-dynmoe"
METHOD = "methods.dynmoe"


def arms() -> dict[str, list[str]]:
    """Overrides of the recipe by arm; the dense arm's depend on what DynMoE spent."""
    options = recipes.load(RECIPE).methods["dynmoe"]
    width, experts = options["width"], options["max_experts"]

    def top_k(k: int) -> list[str]:
        keys = {"experts": experts, "k": k, "width": width, "zero_output": True}
        return [f"{METHOD}=null", f"methods.top-k={yaml.safe_dump(keys, default_flow_style=True)}"]

    return {
        "dynmoe": [],
        "dynmoe without target": [
            f"{METHOD}.target_k=null",
            f"{METHOD}.start_k={options['target_k']}",
        ],
        "dynmoe published": [f"{METHOD}.target_k=null", f"{METHOD}.published=true"],
        "top-k 1": top_k(1),
        "top-k 2": top_k(2),
        "top-k 4": top_k(4),
    }


def dense(matched: list[dict[str, Any]], overrides: list[str]) -> list[str]:
    """The dense arm whose FLOPs are the mean of those of the runs ``matched``."""
    spent = statistics.mean(s["ledger"]["flops"]["spent"] for s in matched)
    known = {}
    for width in (64, 128):
        changes = [f"{METHOD}=null", f"task.width={width}", *overrides]
        known[width] = plan(recipes.load(RECIPE, changes))["flops"]["spent"]
    each = (known[128] - known[64]) / 64  # FLOPs are linear in the width
    return [f"{METHOD}=null", f"task.width={round(64 + (spent - known[64]) / each)}"]


def estimators() -> dict[str, list[str]]:
    """The corrected rule with the other estimates of the output that a closed gate hides."""
    return {f"closed gates: {name}": [f"{METHOD}.closed_gates={name}"] for name in ("zero", "mean")}


def run_one(
    out: Path, overrides: list[str], seed: int, threads: int, finished: bool = False
) -> dict[str, Any]:
    """Run or finish one arm and seed; returns its summary, or what it said when it failed."""
    if not (out / "summary.json").is_file():
        if finished:
            return {"failed": f"seed {seed} was not run to its end"}
        command = [sys.executable, "-m", "sparing.cli", "run", RECIPE, "--out", str(out), "--quiet"]
        command += ["--resume"] if (out / "recipe.yaml").is_file() else []
        for override in (*overrides, f"seed={seed}", f"train.threads={threads}"):
            command += ["-s", override]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=False,
        )
        if done.returncode != 0:
            return {"failed": done.stderr.strip()[-500:]}
    found: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return found


def describe(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm's seeds, their mean and spread."""
    good = [s for s in summaries if "failed" not in s]
    failed = [s["failed"] for s in summaries if "failed" in s]
    entry: dict[str, Any] = {"failed": failed} if failed else {}
    if not good:
        return entry
    values = [s["metric"]["value"] for s in good]
    entry |= {
        "seeds": [s["seed"] for s in good],
        "bits_per_byte": values,
        "mean": statistics.mean(values),
        "min": min(values),
        "max": max(values),
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
        "by_domain": [s["metrics"] for s in good],
        "flops": [s["ledger"]["flops"] for s in good],
        "parameters": good[0]["ledger"]["parameters"]["spent"],
        "tokens": good[0]["tokens"],
        "seconds": [s["seconds"] for s in good],
        "methods": [s["methods"] for s in good],
        "code": sorted({s["code"] for s in good}),
        "corpus": sorted({s["corpus"] for s in good}),
    }
    return entry


def main() -> None:
    """Run what is missing, then write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="*", help="only these; the record then has only these")
    parser.add_argument("--finished", action="store_true", help="run nothing, record what is there")
    parser.add_argument("--estimators", action="store_true", help="also compare estimators")
    parser.add_argument("--set", nargs="*", default=[], help="overrides for every arm")
    parser.add_argument("--out", type=Path, default=Path("runs/language_comparison"))
    parser.add_argument("--record", default="language_comparison")
    asked = parser.parse_args()
    chosen = {**arms(), **(estimators() if asked.estimators else {})}
    if asked.arms:
        chosen = {name: chosen[name] for name in asked.arms if name != "dense"}

    def one(job: tuple[str, int]) -> dict[str, Any]:
        name, seed = job
        place = asked.out / f"{name.replace(' ', '-').replace(':', '')}-{seed}"
        overrides = [*chosen[name], *asked.set]
        return run_one(place, overrides, seed, asked.threads, asked.finished)

    found: dict[str, list[dict[str, Any]]] = {}
    with ThreadPoolExecutor(asked.jobs) as pool:
        # seed by seed, so that a comparison cut short still has whole rows
        jobs = [(name, seed) for seed in range(asked.seeds) for name in chosen]
        for (name, _), summary in zip(jobs, pool.map(one, jobs), strict=True):
            found.setdefault(name, []).append(summary)
        matched = [s for s in found.get("dynmoe", []) if "failed" not in s]
        if matched and (not asked.arms or "dense" in asked.arms):
            chosen["dense"] = dense(matched, asked.set)
            jobs = [("dense", seed) for seed in range(asked.seeds)]
            found["dense"] = list(pool.map(one, jobs))
    results = {
        name: {"overrides": chosen[name], **describe(entries)} for name, entries in found.items()
    }
    for name, entry in results.items():
        if "mean" in entry:
            spent = statistics.mean(f["spent"] for f in entry["flops"])
            print(
                f"{name:<24} {entry['mean']:.4f} ({entry['min']:.4f} to {entry['max']:.4f})  "
                f"{spent / 1e12:.2f} TFLOP"
            )
        for text in entry.get("failed", []):
            print(f"{name:<24} failed: {text}")
    pages = sorted(asked.out.glob("*/page.json"))
    references = json.loads(pages[0].read_text(encoding="utf-8"))["references"] if pages else {}
    write(
        asked.record,
        {"recipe": RECIPE, "set": asked.set, "arms": results, "references": references},
        seeds=range(asked.seeds),
        note="every run: its seed, bits per byte on held-out bytes, ledger FLOPs, package hash",
    )


if __name__ == "__main__":
    main()
