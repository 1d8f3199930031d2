"""A training step of a sparse adapter of MiniLM against a dense one's, in turns.

    SPARING_DATA=... python benchmarks/adapters_step.py

Forward, backward and AdamW on batches of 16 texts of AG News of at most 64 tokens, in fp32 on one
thread. "pairs" are the ratios of steps that followed each other in one round. "units" keeps whole
units of the bottleneck, or ranks. Writes benchmarks/records/adapters_step.json.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import minilm
import sparing
from record import in_turns, spread, summary, write

KINDS = {
    "pfeiffer": {"kind": "pfeiffer"},
    "lora": {"kind": "lora", "rank": 8},
    "lora on all linear layers": {"kind": "lora", "rank": 8, "targets": "all-linear"},
}
FORMS: dict[str, dict[str, Any]] = {
    "dense": {"keep": 1.0},
    "keep 0.6": {"keep": 0.6},
    "keep 0.2": {"keep": 0.2},
    "units, half": {"keep": 0.5, "pattern": "unit"},
}
TARGET = 1.05


def stepping(model: nn.Module, texts: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """One training step of the model, ready to be called again and again."""
    model.train()
    parameters = minilm.trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    loss = minilm.loss(texts)

    def step() -> None:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(texts: Any, base: nn.Module, options: dict[str, Any], repetitions: int) -> Any:
    """Times and ratios to the dense adapter of one kind."""
    batch = minilm.batches(texts, 1)[0]
    steps = {}
    for name, form in FORMS.items():
        method = sparing.SparseAdapter(score="random", seed=0, **options, **form)
        model = sparing.adapt_(copy.deepcopy(base), method)
        steps[name] = stepping(model, texts, batch)
    times = in_turns(steps, repetitions=repetitions, warm_up=2)
    told: dict[str, Any] = {"times": summary(times, "dense"), "pairs": {}}
    for name in FORMS:
        told["pairs"][name] = {
            kind: spread(
                [a / b for a, b in zip(times[name][kind], times["dense"][kind], strict=True)], 4
            )
            for kind in ("wall", "cpu")
        }
    met = told["pairs"]["keep 0.6"]["cpu"]["median"] <= TARGET
    told["keep 0.6 at most 1.05 of dense, by the median pair of CPU times"] = met
    return told


def main() -> None:
    """Measure each kind and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    texts = minilm.task()
    base = texts.model(0).eval()
    results = {}
    for name, options in KINDS.items():
        results[name] = measure(texts, base, options, given.repetitions)
        print(name, results[name]["pairs"], flush=True)
    note = "other programs ran on the machine: see load, and the share that others took"
    write("adapters_step", results, seeds=[0], note=note)


if __name__ == "__main__":
    main()
