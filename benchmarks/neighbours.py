"""Indexes of neighbours while they grow: items a second, recall, and where exact search ends.

    python benchmarks/neighbours.py [--sizes 20000 300000] [--kinds exact inverted graph]
        [--vectors FILE.npy] [--threads 2]

Each batch of 1,000 vectors of 256 entries is looked up among what is stored and among itself, with
the pairs that reverse neighbours are kept by, and then added. ``--vectors`` are embeddings, (n, d)
by numpy, that are repeated with jitter where there are fewer than asked for; without it, a
generator draws 5,000 clusters, in which a neighbour's cosine is about .7. Sizes of a million take
about 2 GB and some minutes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from record import spread, write
from sparing.pool.neighbours import Exact, Neighbours, both, neighbours, probe
from vectors import BATCH, Stream

K = 10
GAIN = 4
"""Neighbours that the gain is a mean over, and at which recall is measured."""
GRAPH_ENDS = 50_000
EXACT_ENDS = 100_000
CROSSING = (10_000, 20_000, 40_000, 80_000, 160_000)


class Taken(NamedTuple):
    """Seconds of a batch: of the search with its pairs, of adding, and of one core's work."""

    search: float
    add: float
    cpu: float


def taken_in(index: Neighbours, rows: np.ndarray, radius: float) -> Taken:
    """One batch, looked up and added."""
    first = int(index.ids()[-1]) + 1 if len(index) else 0
    ids = np.arange(first, first + len(rows))
    start, cpu = time.perf_counter(), time.process_time()
    both(index, rows, K, ids=ids, radius=lambda some: np.full(len(some), radius, dtype=np.float32))
    middle = time.perf_counter()
    index.add(ids, rows)
    return Taken(middle - start, time.perf_counter() - middle, time.process_time() - cpu)


def typical_radius(path: Path | None, size: int, seed: int) -> float:
    """About the distance of the tenth neighbour among ``size`` items: what a newcomer must beat."""
    stream = Stream(path, seed)
    some = Exact(stream.base.shape[1])
    held = min(size, 20_000)
    some.add(np.arange(held), stream.take(held))
    found = some.query(stream.take(200), K)
    return float(np.median(found.distances[:, -1]))


def growing(kind: str, size: int, path: Path | None, seed: int) -> dict[str, Any]:
    """From nothing to ``size``, and then ten batches more, with recall after them."""
    radius = typical_radius(path, size, seed)
    stream = Stream(path, seed)
    index = neighbours(stream.base.shape[1], kind)
    grown = [taken_in(index, rows, radius) for rows in stream.batches(size)]
    there = [taken_in(index, rows, radius) for rows in stream.batches(10 * BATCH)]
    found: dict[str, Any] = {
        "items": len(index),
        "items a second from 0": round(size / sum(t.search + t.add for t in grown)),
        "items a CPU second from 0": round(size / sum(t.cpu for t in grown)),
        "items a second there": spread([BATCH / (t.search + t.add) for t in there], 1),
        "items a CPU second there": spread([BATCH / t.cpu for t in there], 1),
        "search, s": spread([t.search for t in there], 4),
        "add, s": spread([t.add for t in there], 4),
        "longest add while it grew, s": round(max(t.add for t in grown), 3),
        **quality(index, stream.take(500)),
    }
    lists = getattr(getattr(index, "inner", index), "lists", None)
    if lists is not None:
        found["lists"] = len(lists.centroids)
        found["probes"] = getattr(index, "inner", index).probes
    return found


def quality(index: Neighbours, queries: np.ndarray) -> dict[str, Any]:
    """Against every stored vector: recall at 4, and the error of the mean distance to them."""
    ids = index.ids()
    true = np.full((len(queries), GAIN), np.inf, dtype=np.float32)
    for start in range(0, len(ids), 65_536):
        rows = index.vectors(ids[start : start + 65_536])
        far = np.maximum(1 - queries @ rows.T, 0)
        part = np.partition(far, GAIN - 1, axis=1)[:, :GAIN] if len(rows) > GAIN else far
        true = np.sort(np.concatenate([true, part], axis=1), axis=1)[:, :GAIN]
    found = index.query(queries, GAIN).distances
    gain = true.mean(1)
    error = np.abs(found.mean(1) - gain) / np.maximum(gain, 1e-6)
    seen = probe(index, k=GAIN)
    return {
        "recall at 4, within 1e-3": round(float((found <= true[:, -1:] + 1e-3).mean()), 4),
        "recall at 4, exactly": round(float((found <= true[:, -1:] + 1e-6).mean()), 4),
        "error of the mean distance, 95th percentile": round(float(np.quantile(error, 0.95)), 5),
        "error of the mean distance, median": round(float(np.median(error)), 6),
        "probe": {"itself": round(seen.itself, 4), "near": round(seen.near, 4)},
    }


def precisions(path: Path | None, seed: int, size: int = 20_000) -> dict[str, Any]:
    """CPU seconds of a batch by each way to multiply."""
    radius = typical_radius(path, size, seed)
    found = {}
    for precision in ("float32", "bfloat16", "int8"):
        stream = Stream(path, seed)
        index = Exact(stream.base.shape[1], precision=precision)
        index.add(np.arange(size), stream.take(size))
        times = [taken_in(index, rows, radius).cpu for rows in stream.batches(5 * BATCH)]
        found[precision] = {**spread(times, 4), **quality(index, stream.take(200))}
    return found


def crossing(path: Path | None, seed: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Seconds of a batch by size, exact and by lists, and from where lists take fewer."""
    found: dict[str, Any] = {}
    for size in sizes:
        row = {}
        for kind in ("exact", "inverted"):
            stream = Stream(path, seed)
            index = neighbours(stream.base.shape[1], kind)
            for start in range(0, size, 8192):
                n = min(8192, size - start)
                index.add(np.arange(start, start + n), stream.take(n))
            times = [taken_in(index, rows, 0.3) for rows in stream.batches(3 * BATCH)]
            row[kind] = {
                "wall": round(min(t.search + t.add for t in times), 4),
                "cpu": round(min(t.cpu for t in times), 4),
            }
        found[str(size)] = row
    cpu = {
        size: [found[str(size)][kind]["cpu"] for kind in ("exact", "inverted")] for size in sizes
    }
    wins = [size for size, (exact, lists) in cpu.items() if lists < exact]
    return {**found, "lists are faster from": min(wins, default=None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[20_000, 300_000])
    parser.add_argument("--kinds", nargs="*", default=["exact", "inverted", "graph", "auto"])
    parser.add_argument("--vectors", type=Path, help="embeddings, .npy; else drawn clusters")
    parser.add_argument("--crossing", type=int, nargs="*", default=list(CROSSING))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", default="neighbours")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results: dict[str, Any] = {"data": asked.vectors.name if asked.vectors else "clusters"}
    for size in asked.sizes:
        for kind in asked.kinds:
            if (kind == "graph" and size > GRAPH_ENDS) or (kind == "exact" and size > EXACT_ENDS):
                continue
            found = growing(kind, size, asked.vectors, asked.seed)
            results.setdefault(str(size), {})[kind] = found
            print(size, kind, found, flush=True)
    if asked.crossing:
        results["seconds of a batch"] = crossing(asked.vectors, asked.seed, tuple(asked.crossing))
        print(results["seconds of a batch"], flush=True)
        results["exact, 20,000"] = precisions(asked.vectors, asked.seed)
        print(results["exact, 20,000"], flush=True)
    note = (
        f"{asked.threads} threads. Items a second are those of the search among what is stored and "
        f"in the batch for {K} neighbours, of the pairs for reverse neighbours, and of adding, in "
        f"batches of {BATCH}; the gain's own arithmetic and the store are not in them. CPU seconds "
        "are those of one core: they depend less on what else the machine does."
    )
    print(write(asked.record, results, seeds=[asked.seed], note=note))


if __name__ == "__main__":
    main()
