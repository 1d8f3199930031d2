"""What is claimed of DynMoE on the language recipe, checked on the runs of its comparison.

1. At equal compute it is not below top-k: against the line through the top-k arms, read at its own
   compute; and against the best k at any compute. Seed by seed, one-sided margin.
2. Harder tokens take more experts: rank correlation, over held-out tokens, of the experts that a
   token takes with how hard its next byte is, for the top-k model of the same seed, which knows
   nothing of this routing, and for the model itself.
3. The number of experts settles: when it last changed, as a share of the run.

And what each part of the method is worth: its ablations against it, seed by seed.

    python benchmarks/language_comparison.py        # makes the runs
    python benchmarks/language_claims.py --runs runs/language_comparison

Writes benchmarks/records/language_claims.json.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import sparing
from record import write
from sparing.core import registry
from sparing.experts.layer import expert_layers
from sparing.run.compare.found import Found, read_json
from sparing.run.compare.intervals import paired_interval
from sparing.run.compare.statistics import judge, parse_margin
from sparing.tasks.language.sample import evaluating

ADAPTIVE = ("dynmoe", "dynmoe without target")
ABLATIONS = (
    "closed gates zero",
    "closed gates mean",
    "weights by score",
    "weights uniform",
    "target by loss",
    "not adaptive",
)
TOP_K = re.compile(r"top-k (\d+)")
JUDGE = "top-k 2"
"""The arm whose models say which tokens are hard."""


def frontier(found: sparing.Comparison, margin: str) -> dict[str, Any]:
    """Each adaptive arm against the line through the top-k arms, and against the best of them."""
    limit = parse_margin(margin, found.metric, found.higher_is_better)
    fixed = {arm.name: arm for arm in found.arms if TOP_K.fullmatch(arm.name) and arm.finished}
    told: dict[str, Any] = {}
    best = min(fixed.values(), key=lambda arm: arm.mean or math.inf)
    for name in ADAPTIVE:
        arm = found.arm(name)
        seeds = set(arm.values).intersection(*(set(each.values) for each in fixed.values()))
        line, inside = {}, []
        for run in arm.finished:
            if run.seed not in seeds:
                continue
            points = sorted(
                (float(each.cost("flops") or 0), each.value)
                for other in fixed.values()
                for each in other.finished
                if each.seed == run.seed
            )
            spent = float(run.cost("flops") or 0)
            costs, values = zip(*points, strict=True)
            inside.append(costs[0] <= spent <= costs[-1])
            line[int(run.seed or 0)] = float(np.interp(spent, costs, values))
        told[name] = {
            "TFLOP": arm.costs["flops"] / 1e12,
            "within the line's ends": all(inside),
            "against the line through top-k at equal compute": _verdict(arm.values, line, limit),
            f"against the best k ({best.name})": _verdict(arm.values, best.values, limit),
        }
    return told


def _verdict(arm: Mapping[int, float], other: Mapping[int, float], margin: Any) -> dict[str, Any]:
    found = judge(arm, other, margin=margin)
    told: dict[str, Any] = {
        "seeds": found.n,
        "mean": found.mean_arm,
        "other": found.mean_baseline,
        "verdict": found.verdict,
        "p, worse by the margin or more": found.p_high,
    }
    if found.paired is not None:
        told["difference"] = found.paired.estimate
        told["interval, 95 %"] = [found.paired.low, found.paired.high]
    return told


def ablations(found: sparing.Comparison, margin: str) -> dict[str, Any]:
    """Each ablation of the method that has runs, against the method itself."""
    limit = parse_margin(margin, found.metric, found.higher_is_better)
    whole = found.arm("dynmoe").values
    there = {arm.name: arm for arm in found.arms if arm.name in ABLATIONS and arm.finished}
    return {name: _verdict(arm.values, whole, limit) for name, arm in there.items()}


def harder(found: sparing.Comparison) -> dict[str, Any]:
    """Experts of held-out tokens against how hard they are, by adaptive arm."""
    told: dict[str, Any] = {}
    judges = {run.seed: run for run in found.arm(JUDGE).finished}
    task = _task(next(iter(judges.values())))
    difficulty = {seed: _bits(_model(run), task)[0] for seed, run in judges.items()}
    for name in ADAPTIVE:
        by_other, by_own, by_layer, rising = [], [], [], []
        for run in found.arm(name).finished:
            if run.seed not in difficulty:
                continue
            bits, k = _bits(_model(run), task)  # (n,), (L, n)
            mean_k = k.mean(0)
            hard = difficulty[run.seed]
            by_other.append(_rank_correlation(mean_k, hard))
            by_own.append(_rank_correlation(mean_k, bits))
            by_layer.append([_rank_correlation(layer, hard) for layer in k])
            fifths = np.array_split(mean_k[np.argsort(hard, kind="stable")], 5)
            rising.append([float(fifth.mean()) for fifth in fifths])
        told[name] = {
            "tokens": len(hard),
            "rank correlation with the top-k model's bits": _interval(by_other),
            "rank correlation with its own bits": _interval(by_own),
            "by layer, top-k model's bits": np.mean(by_layer, axis=0).tolist(),
            "experts by fifth of difficulty, easiest first": np.mean(rising, axis=0).tolist(),
        }
    return told


def _interval(values: Sequence[float]) -> dict[str, Any]:
    told: dict[str, Any] = {"each seed": list(values)}
    if len(values) > 1:
        over = paired_interval(np.array(values), 0.95)
        told |= {"mean": over.estimate, "interval, 95 %": [over.low, over.high]}
    return told


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)


def _task(run: Found) -> Any:
    options = dict(run.recipe["task"])
    task = registry.task(options.pop("name"))(**options)
    task.prepare(0)
    return task


def _model(run: Found) -> Any:
    return sparing.load(run.path / "model")


def _bits(model: Any, task: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bits of every held-out token, (n,), and the experts that it took by layer, (L, n)."""
    layers = expert_layers(model)
    taken: list[list[torch.Tensor]] = [[] for _ in layers]
    hooks = [
        layer.router.register_forward_hook(
            lambda _m, _a, routing, into=into: into.append(routing.k)
        )
        for layer, into in zip(layers, taken, strict=True)
    ]
    bits = []
    with evaluating(model):
        for _starts, windows in task._held_out.values():
            for part in torch.split(windows, task.options.eval_batch):
                logits = model(input_ids=part[:, :-1], use_cache=False).logits
                each = F.cross_entropy(
                    logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"
                )
                bits.append(each / math.log(2))
    for hook in hooks:
        hook.remove()
    k = [torch.cat(parts).double().numpy() for parts in taken]
    return torch.cat(bits).double().numpy(), np.array(k)


def settled(found: sparing.Comparison) -> dict[str, Any]:
    """Experts alive at the end, and when their number last changed in any layer."""
    told: dict[str, Any] = {}
    for name in ADAPTIVE:
        rows: dict[str, Any] = {}
        for run in found.arm(name).finished:
            history = read_json(run.path / "page.json")["history"]
            last, changes = 0, 0
            for layer in history.values():
                alive = layer["alive"]
                moved = [i for i in range(1, len(alive)) if alive[i] != alive[i - 1]]
                changes += len(moved)
                last = max([last, *(layer["steps"][i] for i in moved)])
            steps = int(run.summary["steps"])
            rows[f"seed {run.seed}"] = {
                "alive by layer": [layer["alive"][-1] for layer in history.values()],
                "changes": changes,
                "last change, share of the run": last / steps,
            }
        told[name] = rows
    return told


def main() -> None:
    """Check the claims on finished runs and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/language_comparison"))
    parser.add_argument("--margin", default="+0.02 bits_per_byte")
    given = parser.parse_args()
    found = sparing.compare(given.runs)
    results = {
        "margin": given.margin,
        "frontier": frontier(found, given.margin),
        "ablations against dynmoe": ablations(found, given.margin.replace("+0", "+-0")),
        "harder tokens": harder(found),
        "settling": settled(found),
    }
    seeds = sorted({int(run.seed or 0) for name in ADAPTIVE for run in found.arm(name).finished})
    note = f"runs of the record language_comparison; package {found.code[:12]}"
    print(write("language_claims", results, seeds=seeds, note=note))


if __name__ == "__main__":
    main()
