"""Items a second that a pool takes in: search, reverse neighbours and writing, beside the original.

    python benchmarks/growth_ingest.py [--million] [--threads 2] [--loop 5000]

Vectors of 256 numbers from a generator of clusters, in batches of 1,000, to a pool in memory and to
one on the disk, each batch durable before the next: growing from 0 to 20,000, and 8,000 more on top
of these. ``--million`` goes on to one million in memory, with recall@4 and the gain's error for a
sample of items whose true neighbours were computed; a neighbour within 1e-3 of the true fourth
distance counts as found. A batch into a pool of its own comes first: packages are imported once a
process. Memory is all that a pool on the disk holds in arrays and objects besides the index's
vectors and codes, for each item after the first batch. The released loop looks up and adds one item
after the other in hnswlib (M 48, ef_construction 100, ef 32, k 4), for the first ``--loop`` items.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from held_memory import besides
from record import write
from sparing.pool.gain import expected
from sparing.pool.growth import Growth

DIM, BATCH, FIRST, MORE, MILLION = 256, 1000, 20_000, 8_000, 1_000_000
CLUSTERS, SPREAD, PROBES = 5000, 0.7, 512
Rows = NDArray[np.float32]


def stream(seed: int, count: int) -> Iterator[Rows]:
    """Batches of clustered vectors of length 1; the same again for the same seed."""
    random = np.random.Generator(np.random.SFC64(seed))
    centres = random.standard_normal((CLUSTERS, DIM), dtype=np.float32)
    for _ in range(0, count, BATCH):
        rows = centres[random.integers(0, CLUSTERS, BATCH)]
        rows = rows + np.float32(SPREAD) * random.standard_normal((BATCH, DIM), dtype=np.float32)
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


def same(batch: torch.Tensor) -> torch.Tensor:
    return batch


def grow(path: Path | None, seed: int, count: int) -> tuple[Growth, dict[str, float]]:
    """A pool of so many items, and items a second of wall time and of one core's CPU time."""
    pool = Growth(path, encoder=same, clean=False, seed=seed)
    ends = {count: f"to {count:,}", FIRST: "0 to 20,000", FIRST + MORE: "20,000 to 28,000"}
    told: dict[str, float] = {}
    done, last, wall, cpu, held = 0, 0, 0.0, 0.0, 0
    for rows in stream(seed, count):
        batch = torch.from_numpy(rows)
        start = time.perf_counter(), time.process_time()
        pool.add(batch)
        wall += time.perf_counter() - start[0]
        cpu += time.process_time() - start[1]
        done += len(rows)
        if path is not None and done == BATCH:
            held = besides(pool)
        if done in ends:
            told[f"{ends[done]}, a second"] = round((done - last) / wall)
            told[f"{ends[done]}, a CPU second"] = round((done - last) / cpu)
            last, wall, cpu = done, 0.0, 0.0
            print(path is not None, told, flush=True)
    if path is not None and done > BATCH:
        told["bytes of memory an item"] = round((besides(pool) - held) / (done - BATCH), 1)
    return pool, told


def quality(pool: Growth, seed: int, count: int) -> dict[str, float]:
    """Recall of four neighbours, and how far gains are from those of an exact search."""
    near = pool._members.main
    probes = np.sort(np.random.default_rng(seed).choice(count, PROBES, replace=False))
    rows = near.index.vectors(probes)
    best = np.full((PROBES, near.table.keep + 1), np.inf, np.float32)
    for at, block in enumerate(stream(seed, count)):
        far = np.maximum(1 - rows @ block.T, 0)
        own = np.flatnonzero(probes // BATCH == at)
        far[own, probes[own] % BATCH] = np.inf
        best = np.sort(np.concatenate([best, far], 1), axis=1)[:, : near.table.keep + 1]
    held = near.table.distances[probes].astype(np.float32)
    recall = (held[:, :4] <= best[:, 3:4] + 1e-3).mean()
    beyond = near.tail(best[:, near.table.keep - 1])
    exact = expected(best[:, : near.table.keep], count - 1, near.k, beyond=beyond)
    error = np.abs(pool.gains()[probes] / exact - 1)
    return {
        "recall@4": round(float(recall), 4),
        "gain's error, median": round(float(np.median(error)), 5),
        "gain's error, 95th percentile": round(float(np.quantile(error, 0.95)), 5),
    }


def released(seed: int, count: int) -> float:
    """Items a second of the released loop."""
    import hnswlib

    index = hnswlib.Index(space="cosine", dim=DIM)
    index.init_index(max_elements=count, M=48, ef_construction=100)
    index.set_ef(32)
    rows = np.concatenate(list(stream(seed, count)))
    gains = []
    start = time.perf_counter()
    for number, row in enumerate(rows):
        if number:
            _, far = index.knn_query(row, k=min(4, number))
            gains.append(float(far.mean()))
        index.add_items(row, number)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loop", type=int, default=5000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seed, results = 0, {}
    folder = Path(tempfile.mkdtemp())
    try:
        grow(folder / "first", seed + 1, BATCH)[0].close()
        pool, results["on the disk"] = grow(folder / "pool", seed, FIRST + MORE)
        results["bytes an item on the disk besides vectors and payload"] = beside(folder / "pool")
        pool.close()
    finally:
        shutil.rmtree(folder)
    pool, results["in memory"] = grow(None, seed, FIRST + MORE)
    results["at 28,000"] = quality(pool, seed, FIRST + MORE)
    results["the released loop, a second"] = round(released(seed, options.loop))
    if options.million:
        pool, results["one million, in memory"] = grow(None, seed, MILLION)
        results["at one million"] = quality(pool, seed, MILLION)
    print(results)
    write("growth_ingest", results, seeds=[seed])


def beside(path: Path) -> float:
    """Bytes on the disk that are neither vectors nor payload, for each item."""
    files: list[Any] = [f for f in path.rglob("*") if f.is_file()]
    kept = [f for f in files if f.parent.name not in ("vectors", "payload")]
    return round(sum(f.stat().st_size for f in kept) / (FIRST + MORE), 1)


if __name__ == "__main__":
    main()
