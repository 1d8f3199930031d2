"""Loss right after conversion: construction x gate x scale, on a trained model of stories.

    python benchmarks/convert_table.py [--experts 8] [--active 2] [--seeds 3] [--model PATH]

The model is the one that is shipped (stories260k) or any Hugging Face causal model. Text: what the
dense model writes itself from its first token at temperature 1; 64 sequences of 256 tokens to
calibrate on (32 gradient batches at most), 32 others, of another seed, to validate on. Each cell is
the loss in nats a token of the dense model with its hidden units weighed as the experts' router
would, which is the converted model exactly (tests/convert). Beside: the dense model, one cut to the
same active width by importance, no feed-forward at all, and the gate of an oracle, which sees the
dense output. A seed changes the split, the gate, and the text to calibrate on; validation text is
the same. Writes benchmarks/records/convert_table.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparing
from record import write
from sparing.convert import Conversion, activations, deciding, fitting, simulating
from sparing.convert.pieces import Decision
from sparing.convert.reading import Batch, written
from sparing.convert.skeleton import Skeleton, skeleton
from sparing.convert.split import split
from sparing.experts.families import Block, feed_forwards

STORIES = Path(sparing.__file__).parent / "tasks" / "language" / "data" / "stories260k"
METHODS = (
    ("random", "text"),
    ("contiguous", "text"),
    ("kmeans", "text"),
    ("kmeans-cosine", "text"),
    ("groups", "text"),
    ("coactivation", "text"),
    ("gradient", "text"),
    ("gradient", "tokens"),
    ("sharing-inner", "tokens"),
    ("sharing-inter", "tokens"),
)
GATES = ("zero", "random", "centroids", "keys", "distilled", "oracle")
SCALES = ("published", "unbiased", "unit", "calibrated", "learned")
BIASED = ("calibrated + mean", "calibrated + fitted", "unit + mean")


@torch.no_grad()
def loss(model: Any, batches: Sequence[Batch]) -> float:
    """Nats a token."""
    total = [float(model(**batch).loss) * len(batch["input_ids"]) for batch in batches]
    return sum(total) / sum(len(batch["input_ids"]) for batch in batches)


def cells(
    model: Any,
    dense: Skeleton,
    blocks: Sequence[Block],
    train: Sequence[Batch],
    test: Sequence[Batch],
    base: Conversion,
) -> dict[str, float]:
    """Loss by "gate, scale" for one construction."""
    scores = deciding.scores_of(model, blocks, train, base, lambda *told: None)
    inputs = activations.inputs_of(model, blocks, train, deciding.TOKENS)
    made = [
        deciding.dealt(dense, b, i, base, None if scores is None else scores[i])
        for i, b in enumerate(blocks)
    ]
    samples = [
        deciding.sampled(dense, b, m, x) for b, m, x in zip(blocks, made, inputs, strict=True)
    ]
    found: dict[str, float] = {}
    for gate in GATES:
        if gate == "oracle":
            found |= oracle(model, blocks, samples, made, test, base)
            continue
        options = dataclasses.replace(base, gate=gate)
        gates = [
            deciding.gate_of(dense, b, i, s, m, options)
            for i, (b, s, m) in enumerate(zip(blocks, samples, made, strict=True))
        ]
        for rule in (*SCALES, *BIASED):
            if rule == "learned" and gate not in ("random", "distilled"):
                continue  # it takes as long as all else together
            scale, _, bias = rule.partition(" + ")
            wanted = dataclasses.replace(options, scale=scale, compensate=bias or "none")
            decisions = {
                b.path: deciding.scaled(dense, b, s, m, g, wanted)
                for b, s, m, g in zip(blocks, samples, made, gates, strict=True)
            }
            if scale == "learned":
                decisions = deciding.learned(
                    model, blocks, decisions, train, wanted, lambda *told: None
                )
            weigh = fitting.softmax_top_k(wanted.chosen)
            with simulating.converted(blocks, decisions, weigh):
                found[f"{gate}, {rule}"] = loss(model, test)
    return found


def oracle(
    model: Any,
    blocks: Sequence[Block],
    samples: Sequence[fitting.Sample],
    made: Sequence[Any],
    test: Sequence[Batch],
    base: Conversion,
) -> dict[str, float]:
    """Each token the experts that matter most for it, with even weights and the best scale."""
    chosen = base.chosen
    parts = {b.path: (b, m) for b, m in zip(blocks, made, strict=True)}

    def weigh_of(path: str) -> fitting.Weigh:
        block, own = parts[path]
        down = block.read()["down"].float()

        def weigh(x: Tensor, _gate: Tensor) -> Tensor:
            hidden = hidden_of(block, x)
            sample = fitting.sample(x, hidden, down, own)
            return fitting.best_choice(sample, chosen).float() / chosen

        return weigh

    handles: list[Any] = []
    try:
        for block, own, sample in zip(blocks, made, samples, strict=True):
            weigh = weigh_of(block.path)
            gate = torch.zeros(base.routed, block.dim)
            scale = fitting.calibrated(sample, weigh(sample.x, gate))
            decision = Decision(split=own, scale=scale, gate=gate)
            handles += simulating.hooks(block, decision, weigh, scale)
        return {"oracle, calibrated": loss(model, test)}
    finally:
        for handle in handles:
            handle.remove()


def hidden_of(block: Block, x: Tensor) -> Tensor:
    """The block's hidden units on inputs x: (T, d) -> (T, f)."""
    w = block.read()
    up = torch.nn.functional.linear(x, w["up"], w.get("up_bias"))
    if block.kind == "plain":
        return block.act(up)
    return block.act(torch.nn.functional.linear(x, w["gate"], w.get("gate_bias"))) * up


def cut(
    model: Any, blocks: Sequence[Block], train: Sequence[Batch], test: Sequence[Batch], share: float
) -> float:
    """The dense model with the given share of each block's hidden units, the most important."""
    labels = [torch.zeros(len(batch["input_ids"]), dtype=torch.int64) for batch in train]
    scores = activations.importance(model, blocks, train, labels, 1)
    decisions = {}
    for block, score in zip(blocks, scores, strict=True):
        order = score[0].argsort(descending=True)
        kept = round(share * block.width)
        decisions[block.path] = Decision(
            split=split([order[kept:]], order[:kept]), scale=0.0, gate=torch.zeros(1, block.dim)
        )
    with simulating.converted(blocks, decisions, fitting.softmax_top_k(1)):
        return loss(model, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", type=Path, default=STORIES)
    parser.add_argument("--methods", default=None, help="only these, with commas")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--record", default="convert_table")
    asked = parser.parse_args()
    dense = skeleton(asked.model)
    model = deciding.loaded(dense)
    blocks = feed_forwards(model)
    test = written(model, max(1, asked.sequences // 2), asked.length, 1_000_000)
    share = asked.active / asked.experts
    rows: dict[str, Mapping[str, Any]] = {}
    cuts, nothing = [], []
    for seed in range(asked.seeds):
        train = written(model, asked.sequences, asked.length, seed)
        cuts.append(cut(model, blocks, train, test, share))
        nothing.append(cut(model, blocks, train, test, 0.0))
        for method, clusters in METHODS:
            if asked.methods and method not in asked.methods.split(","):
                continue
            base = Conversion(
                experts=asked.experts,
                active=asked.active,
                method=method,
                clusters=clusters,  # type: ignore[arg-type]
                seed=seed,
            )
            name = method if clusters == "text" else f"{method} by tokens"
            found = cells(model, dense, blocks, train, test, base)
            row = rows.setdefault(name, {})
            for cell, value in found.items():
                row.setdefault(cell, []).append(round(value, 4))  # type: ignore[attr-defined]
            best = min(found, key=lambda cell: found[cell] if "oracle" not in cell else 99.0)
            print(f"seed {seed}, {name}: best {best} {found[best]:.3f}", flush=True)
    plain = loss(model, test)
    results = {
        "model": asked.model.name,
        "experts": asked.experts,
        "active": asked.active,
        "unit": "nats a token, one number a seed",
        "dense": round(plain, 4),
        "cut to the active width by importance": [round(v, 4) for v in cuts],
        "without feed-forward": [round(v, 4) for v in nothing],
        "table": rows,
    }
    write(asked.record, results, seeds=range(asked.seeds))
    print(f"dense {plain:.3f}, cut {statistics.mean(cuts):.3f}")
    for name, row in rows.items():
        means = {cell: statistics.mean(values) for cell, values in row.items()}
        for gate in GATES:
            said = [f"{means[c]:.2f}" for c in means if c.startswith(f"{gate},")]
            print(f"{name:<24}{gate:<10}{' '.join(said)}")


if __name__ == "__main__":
    main()
