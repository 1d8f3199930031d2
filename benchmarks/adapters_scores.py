"""What each score of a sparse adapter costs on MiniLM, and how far its masks are determined.

    SPARING_DATA=... python benchmarks/adapters_scores.py

Cost: CPU seconds of ``adapt_`` with eight batches of 16 texts, over those of 200 training steps of
the dense adapter, measured in the same process. Agreement, on batches of 8 texts, one thread:
data-free masks of one seed against each other, in fp32 and fp64; gradient scores in fp64, twice,
bit for bit; and the share of the entries that a mask from fp32 scores keeps in common with one from
fp64 scores. Writes benchmarks/records/adapters_scores.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import minilm
import sparing
from record import write
from sparing.weights import scoring
from sparing.weights.factor import Factor
from sparing.weights.options import DATA_FREE, SCORES

STEPS, KEEP = 200, 0.6
KINDS = ("pfeiffer", "lora")


def adapted(
    base: nn.Module, texts: Any, data: Any, score: str, kind: str, seed: int = 0, **more: Any
) -> tuple[nn.Module, float]:
    """A copy of the base with a sparse adapter, and the CPU seconds that giving it one took."""
    model = copy.deepcopy(base)
    method = sparing.SparseAdapter(kind=kind, keep=KEEP, score=score, seed=seed, **more)
    begun = time.process_time()
    sparing.adapt_(model, method, data=data, loss=minilm.loss(texts))
    return model, time.process_time() - begun


def masks(model: nn.Module) -> Tensor:
    """The masks of all factors in one vector."""
    factors = [module for module in model.modules() if isinstance(module, Factor)]
    return torch.cat([factor.mask().reshape(-1) for factor in factors])


def step_seconds(base: nn.Module, texts: Any, data: list[Any]) -> float:
    """CPU seconds of one training step of the dense adapter, the median of all batches but one."""
    model = sparing.adapt_(
        copy.deepcopy(base), sparing.SparseAdapter(keep=1.0, score="random", seed=0)
    )
    model.train()
    optimizer = torch.optim.AdamW(minilm.trained(model), lr=1e-4, fused=True)
    loss, times = minilm.loss(texts), []
    for batch in data:
        begun = time.process_time()
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - begun)
    return statistics.median(times[1:])


def costs(base: nn.Module, texts: Any) -> dict[str, Any]:
    """Seconds of each score, and their share of a fine-tuning."""
    data = minilm.batches(texts, 8)
    whole = STEPS * step_seconds(base, texts, data)
    told: dict[str, Any] = {f"{STEPS} steps, CPU seconds": round(whole, 2)}
    for score in SCORES:
        seconds = adapted(base, texts, data, score, "pfeiffer")[1]
        told[score] = {"CPU seconds": round(seconds, 3), "share": round(seconds / whole, 4)}
        print(score, told[score], flush=True)
    return told


def scored(base: nn.Module, texts: Any, data: Any, score: str, kind: str) -> dict[str, Tensor]:
    """The scores themselves, by factor, as they are before masks are made of them."""
    seen: dict[str, Tensor] = {}
    whole = scoring._scores

    def noting(*given: Any) -> dict[str, Tensor]:
        seen.update(found := whole(*given))
        return found

    scoring._scores = noting
    try:
        adapted(base, texts, data, score, kind)
    finally:
        scoring._scores = whole
    return seen


def agreement(base: nn.Module, texts: Any, kind: str) -> dict[str, Any]:
    """Of each score how far its mask is determined."""
    data = minilm.batches(texts, 2, rows=8)
    double = copy.deepcopy(base).double()
    told: dict[str, Any] = {}
    for score in SCORES:
        first = masks(adapted(base, texts, data, score, kind)[0])
        wide = masks(adapted(double, texts, data, score, kind)[0])
        row: dict[str, Any] = {
            "fp32 and fp64 masks in common": round(float((first & wide).sum() / first.sum()), 6)
        }
        if score in DATA_FREE:
            again = masks(adapted(base, texts, data, score, kind)[0])
            other = masks(adapted(base, texts, data, score, kind, seed=1)[0])
            row["same seed, same mask"] = first.equal(again) and first.equal(wide)
            row["another seed, another mask"] = not first.equal(other)
        else:
            one, two = (scored(double, texts, data, score, kind) for _ in range(2))
            row["fp64 scores bit-equal"] = all(one[name].equal(two[name]) for name in one)
        told[score] = row
        print(kind, score, row, flush=True)
    return told


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    texts = minilm.task()
    base = texts.model(0).eval()
    results: dict[str, Any] = {"cost": costs(base, texts)}
    for kind in given.kinds:
        results[f"agreement, {kind}"] = agreement(base, texts, kind)
    note = "No GPU was there: fp32 against fp64 on a processor stands for the spread of devices."
    write("adapters_scores", results, seeds=[0, 1], note=note)


if __name__ == "__main__":
    main()
