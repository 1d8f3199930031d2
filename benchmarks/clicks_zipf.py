"""A made-up log with known truth, 10^7 ids in 26 fields: the clip's cost, and rare ids.

    python benchmarks/clicks_zipf.py [--rows 400000] [--seeds 3] [--ids 10000000] [--only speed]

Speed: a whole step of DeepFM on vectors of 10 numbers, 400-400-400, with and without the clip, in
turns: on sparse gradients with row-wise Adam, and on dense ones with torch's Adam, whose passes
over the table are what sparse gradients save.

Rare ids: the paper says that a large batch harms ids that are rare, and that the clip mends it.
The same DeepFM with a small deep part, row-wise Adam, batch 8,192, the clip on vectors and linear
terms alike: off, as published, and with ratio and bound by powers of ten lower, each at two rates
of the tables; and off with 1,024 rows a batch, which by the paper suffers less. An id's effect is
the mean log-odds of rows with the id put in, less the mean over rows as they came; estimated by the
model and known from the log. By how often the id came in training: the root of the mean squared
error over that of the true effects. 1 is what a model has that says nothing of an id. Errors of
arms are paired by seed.

Writes benchmarks/records/clicks_zipf.json, anew after every run.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import sparing
from record import in_turns, spread, write
from sparing.tasks.clicks.encoded import Encoded, joined
from sparing.tasks.clicks.models import ClickModel, Shape
from sparing.tasks.clicks.shuffle import Batches
from sparing.tasks.clicks.zipf import ZipfLog
from sparing.updates.rowwise import RowWise

BATCH = 8192
SMALL = 1024
RATES = (1e-2, 3e-2)
OFF = "clip off"
ARMS = {
    OFF: (BATCH, math.inf),
    f"clip off, batch {SMALL}": (SMALL, math.inf),
    "clip as published": (BATCH, 1.0),
    "clip / 1e2": (BATCH, 1e-2),
    "clip / 1e4": (BATCH, 1e-4),
    "clip / 1e6": (BATCH, 1e-6),
}
"""Rows of a batch, and what ratio and bound are multiplied by."""
BANDS = (0, 1, 2, 4, 16, 256)
"""Where each band of frequencies begins; the last has no end."""
IDS, CONTEXTS = 100, 64
"""Ids of a field and band, and rows into which each is put."""


def whole(log: ZipfLog) -> Encoded:
    """All rows of the log."""
    return joined([(log.block(k), slice(None)) for k in range(len(log.sizes))])


def model_of(log: ZipfLog, widths: tuple[int, ...], seed: int, *, sparse: bool) -> ClickModel:
    """A DeepFM for the log's fields."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        shape = Shape(widths=widths)
        return ClickModel("deepfm", log.field_sizes, 0, shape, sparse=sparse, log_odds=log.bias)


def optimizer_of(model: ClickModel, rate: float) -> RowWise:
    """Row-wise Adam for the tables, Adam for the rest."""
    tables = list(model.tables.parameters())
    known = {id(p) for p in tables}
    rest = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": rest}, {"params": tables, "lr": rate, "rule": "rowwise-adam"}]
    return RowWise(groups, lr=2e-3)


def step(model: ClickModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """One step on a batch."""
    F.binary_cross_entropy_with_logits(model(batch["ids"]), batch["labels"]).backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- speed -----------------------------------------------------------------------------------


def stepping(log: ZipfLog, batch: dict[str, Tensor], *, sparse: bool, clip: bool) -> Any:
    """A function that makes one step."""
    model = model_of(log, (400, 400, 400), 0, sparse=sparse)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7)
    optimizer = optimizer_of(model, 1e-3) if sparse else adam
    if clip:
        sparing.CowClip.direct(model, optimizer, by_frequency=0)
    return lambda: step(model, optimizer, batch)


def speed(ids: int, repetitions: int) -> dict[str, Any]:
    """CPU seconds of a step by form of the gradient, and the clip's share."""
    log = ZipfLog(rows=BATCH, ids=ids, block_rows=BATCH)
    batch = next(iter(Batches(log, BATCH, ahead=False)))
    found: dict[str, Any] = {}
    for name, sparse in (("sparse", True), ("dense", False)):
        functions: dict[str, Callable[[], Any]] = {
            word: stepping(log, batch, sparse=sparse, clip=clip)
            for word, clip in (("clip", True), ("none", False))
        }
        times = in_turns(functions, repetitions=repetitions, warm_up=1)
        cpu = {word: times[word]["cpu"] for word in functions}
        extra = [(a - b) / a for a, b in zip(cpu["clip"], cpu["none"], strict=True)]
        found[name] = {
            "seconds of a step with the clip": spread(cpu["clip"], 4),
            "seconds of a step without": spread(cpu["none"], 4),
            "share of the clip, counting included": spread(extra, 4),
        }
        del functions
    medians = [found[n]["seconds of a step with the clip"]["median"] for n in ("dense", "sparse")]
    found["dense over sparse"] = round(medians[0] / medians[1], 2)
    return found


# ---- rare ids --------------------------------------------------------------------------------


def asked(log: ZipfLog, data: Encoded, seed: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(field, band, ids): up to ``IDS`` of each field and band, by how often they came."""
    generator = np.random.default_rng([seed, 1])
    for field, size in enumerate(log.field_sizes):
        counts = np.bincount(data.ids[:, field], minlength=size)
        bands = np.searchsorted(BANDS, counts, side="right") - 1
        for band in range(1, len(BANDS)):
            there = np.flatnonzero(bands == band)
            if len(there):
                yield field, band, generator.permutation(there)[:IDS]


def effects(
    odds: Callable[[np.ndarray], np.ndarray], contexts: np.ndarray, field: int, ids: np.ndarray
) -> np.ndarray:
    """Of each id of a field, (n,): the mean log-odds with it put into rows (C, F), less without."""
    rows = np.repeat(contexts[None], len(ids), 0)
    rows[:, :, field] = ids[:, None]
    put = odds(rows.reshape(-1, rows.shape[-1])).reshape(len(ids), len(contexts))
    return np.asarray(put.mean(1) - odds(contexts).mean())


def errors(log: ZipfLog, model: ClickModel, data: Encoded, seed: int) -> dict[str, float]:
    """By band: the error over the size of the true effects."""

    @torch.inference_mode()
    def said(ids: np.ndarray) -> np.ndarray:
        return np.asarray(model(torch.from_numpy(ids)).double().numpy())

    generator = np.random.default_rng([seed, 2])
    contexts = data.ids[generator.integers(len(data), size=CONTEXTS)].astype(np.int64)
    wrong, true = np.zeros((2, len(BANDS)))
    for field, band, ids in asked(log, data, seed):
        known = effects(log.odds, contexts, field, ids)
        wrong[band] += np.square(effects(said, contexts, field, ids) - known).sum()
        true[band] += np.square(known).sum()
    return {
        band_name(band): round(float(np.sqrt(wrong[band] / true[band])), 4)
        for band in range(1, len(BANDS))
        if true[band]
    }


def band_name(band: int) -> str:
    """1, 2 to 3, ..."""
    low, high = BANDS[band], BANDS[band + 1] - 1 if band + 1 < len(BANDS) else None
    return f"{low} and more" if high is None else (f"{low}" if high == low else f"{low} to {high}")


def trained(
    log: ZipfLog, data: Encoded, seed: int, rate: float, batch_size: int, times: float
) -> tuple[ClickModel, float]:
    """The model after an epoch, and the share of present rows that were clipped."""
    model = model_of(log, (64, 64), seed, sparse=True)
    optimizer = optimizer_of(model, rate)
    clip = sparing.CowClip.direct(
        model, optimizer, ratio=times, bound=1e-5 * min(times, 1.0), linear=True, by_frequency=0
    )
    for batch in Batches(data, batch_size, seed=seed, ahead=False):
        step(model, optimizer, batch)
    return model.eval(), float(clip.signals()["clipped_so_far"])


def rare(given: argparse.Namespace, results: dict[str, Any], note: Callable[[], None]) -> None:
    """All arms and seeds into ``results``."""
    for seed in range(given.seeds):
        log = ZipfLog(rows=given.rows, ids=given.ids, seed=seed)
        data = whole(log)
        for rate in given.rates:
            for name, (size, times) in ARMS.items():
                begun = time.process_time()
                model, clipped = trained(log, data, seed, rate, size, times)
                found = {"share clipped": round(clipped, 4), **errors(log, model, data, seed)}
                arm = results.setdefault(f"tables {rate:g}, {name}", {"seeds": {}})
                arm["seeds"][seed] = found | {"CPU s": round(time.process_time() - begun, 1)}
                print(rate, name, found, flush=True)
                note()
    for rate in given.rates:
        off = results[f"tables {rate:g}, {OFF}"]["seeds"]
        for name in ARMS:
            arm = results[f"tables {rate:g}, {name}"]
            arm["less off, mean and standard error over seeds"] = {
                band: paired([arm["seeds"][s][band] - off[s][band] for s in off])
                for band in off[0]
                if band not in ("share clipped", "CPU s")
            }
    note()


def paired(differences: list[float]) -> list[float]:
    """Mean and standard error."""
    spread_of = np.std(differences, ddof=1) / math.sqrt(len(differences))
    return [round(float(np.mean(differences)), 4), round(float(spread_of), 4)]


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--ids", type=int, default=10_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="*", default=list(RATES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", choices=("speed", "rare"))
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("two seeds at least, or there is no standard error")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}

    def note() -> None:
        what = f"{given.ids:,} ids in 26 fields; one thread; CPU seconds"
        write("clicks_zipf", results, seeds=range(given.seeds), note=what)

    if given.only != "rare":
        results["speed"] = speed(given.ids, given.repetitions)
        print(results["speed"], flush=True)
        note()
    if given.only != "speed":
        rare(given, results.setdefault("rare ids", {}), note)


if __name__ == "__main__":
    main()
