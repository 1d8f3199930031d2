"""Items a second that a pool takes in: search, reverse neighbours and writing, beside the original.

    python benchmarks/growth_ingest.py [--rounds 7] [--loop 5000] [--vectors FILE.npy]
    python benchmarks/growth_ingest.py --million --record growth_million
    python benchmarks/growth_ingest.py --million --vectors FILE.npy --record growth_million_texts

Vectors of 256 numbers in batches of 1,000, from a generator of clusters or from a file of
embeddings (``benchmarks/text_vectors.py`` makes one) that come again with jitter where it is
shorter. To a pool in memory and to one on the disk, each batch durable before the next: growing
from 0 to 20,000, and 8,000 more on top of these, in turns, ``--rounds`` times. ``--million``: in
memory on to one million, and 8,000 more on top of these, some five minutes of two cores. A batch
into a pool of its own comes first: packages are imported once a process. Told are recall@4 and the
gain's error for a sample of items whose distances to all others were computed; a neighbour within
1e-3 of the true fourth distance counts as found. Memory of the pool on the disk is all that it
holds in arrays and objects besides the index's vectors and codes, for each item after the first
batch. The released loop looks up and adds one item after the other in hnswlib (M 48,
ef_construction 100, ef 32, k 4), for the first ``--loop`` items.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from held_memory import besides
from record import spread, write
from sparing.pool.gain import expected
from sparing.pool.growth import Growth
from vectors import BATCH, DIM, Stream

FIRST, MORE, MILLION, TOLD = 20_000, 8_000, 1_000_000, 100_000
WIDTH, PROBES = 0.7, 256


def same(batch: torch.Tensor) -> torch.Tensor:
    return batch


def grow(
    path: Path | None, data: Path | None, seed: int, ends: tuple[int, ...]
) -> tuple[Growth, dict[str, float]]:
    """A pool, and items a second of wall time and of one core's CPU time up to each of the ends."""
    pool = Growth(path, encoder=same, clean=False, seed=seed)
    told: dict[str, float] = {}
    last, done, held = 0, 0, 0
    wall, cpu = Clock(time.perf_counter), Clock(time.process_time)
    for rows in Stream(data, seed, WIDTH).batches(ends[-1]):
        batch = torch.from_numpy(rows)
        with wall, cpu:
            pool.add(batch)
        done += len(rows)
        if path is not None and done == BATCH:
            held = besides(pool)
        if done in ends:
            name = f"{last:,} to {done:,}"
            told[f"{name}, a second"] = round((done - last) / wall.lap())
            told[f"{name}, a CPU second"] = round((done - last) / cpu.lap())
            last = done
        if done in ends or done % TOLD == 0:
            print(done, f"{done / wall.all:.0f} a second", told, flush=True)
    told["all, a second"] = round(done / wall.all)
    if path is not None and done > BATCH:
        told["bytes of memory an item"] = round((besides(pool) - held) / (done - BATCH), 1)
    return pool, told


class Clock:
    """Seconds spent inside of it: in all, and since the last lap."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.all, self.before = now, 0.0, 0.0

    def __enter__(self) -> None:
        self.start = self.now()

    def __exit__(self, *_: object) -> None:
        self.all += self.now() - self.start

    def lap(self) -> float:
        found, self.before = self.all - self.before, self.all
        return found


def quality(pool: Growth, data: Path | None, seed: int, count: int) -> dict[str, float]:
    """Recall of four neighbours, and how far gains are from those by all distances."""
    if len(pool) != count:
        raise SystemExit(f"{count - len(pool)} vectors were there already: ids are not positions")
    near = pool._members.main
    probes = np.sort(np.random.default_rng(seed).choice(count, PROBES, replace=False))
    rows = near.index.vectors(probes)
    every = np.empty((PROBES, count), np.float32)
    for at, block in enumerate(Stream(data, seed, WIDTH).batches(count)):
        every[:, at * BATCH : (at + 1) * BATCH] = np.maximum(1 - rows @ block.T, 0)
    every[np.arange(PROBES), probes] = np.inf
    exact = np.empty(PROBES)
    best = np.empty((PROBES, 4), np.float32)
    for row, distances in enumerate(every):
        distances.sort()
        best[row] = distances[:4]
        exact[row] = expected(distances[None, :-1], count - 1, near.k)[0]
    held = near.table.distances[probes, :4].astype(np.float32)
    error = np.abs(pool.gains()[probes] / exact - 1)
    return {
        "recall@4": round(float((held <= best[:, 3:] + 1e-3).mean()), 4),
        "gain's error, median": round(float(np.median(error)), 5),
        "gain's error, 95th percentile": round(float(np.quantile(error, 0.95)), 5),
    }


def released(data: Path | None, seed: int, count: int) -> float:
    """Items a second of the released loop."""
    import hnswlib

    index = hnswlib.Index(space="cosine", dim=DIM)
    index.init_index(max_elements=count, M=48, ef_construction=100)
    index.set_ef(32)
    rows = Stream(data, seed, WIDTH).take(count)
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
    parser.add_argument("--size", type=int, default=MILLION, help="in place of a million")
    parser.add_argument("--vectors", type=Path, help="embeddings, .npy; else drawn clusters")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loop", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", default="growth_ingest")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seed, data = 0, options.vectors
    results: dict[str, Any] = {"data": data.name if data else "clusters"}
    if data and data.with_suffix(".json").is_file():
        results["data"] = json.loads(data.with_suffix(".json").read_text())
    folder = Path(tempfile.mkdtemp())
    try:
        grow(folder / "first", data, seed + 1, (BATCH,))[0].close()
        if options.million:
            million(results, data, seed, options.size)
        else:
            beginning(results, data, seed, folder, options.rounds)
    finally:
        shutil.rmtree(folder)
    results["the released loop, a second"] = round(released(data, seed, options.loop))
    print(json.dumps(results, indent=1))
    write(options.record, results, seeds=[seed])


def beginning(
    results: dict[str, Any], data: Path | None, seed: int, folder: Path, rounds: int
) -> None:
    """On the disk and in memory in turns, and the spread of each figure."""
    told: dict[str, list[dict[str, float]]] = {"on the disk": [], "in memory": []}
    ends = (FIRST, FIRST + MORE)
    for _ in range(rounds):
        pool, found = grow(folder / "pool", data, seed, ends)
        told["on the disk"].append(found)
        results["bytes an item on the disk besides vectors and payload"] = beside(folder / "pool")
        pool.close()
        shutil.rmtree(folder / "pool")
        pool, found = grow(None, data, seed, ends)
        told["in memory"].append(found)
    for name, each in told.items():
        results[name] = {key: spread((one[key] for one in each), 1) for key in each[0]}
    results["at 28,000"] = quality(pool, data, seed, FIRST + MORE)


def million(results: dict[str, Any], data: Path | None, seed: int, size: int) -> None:
    """In memory, once."""
    pool, results["in memory"] = grow(None, data, seed, (FIRST, FIRST + MORE, size, size + MORE))
    results["found"] = quality(pool, data, seed, size + MORE)
    results["bytes an item besides vectors, codes with their ids, and payload"] = held(pool)
    results["index"] = effort(pool)


def held(pool: Growth) -> dict[str, float]:
    """Bytes an item that a pool in memory takes, with its arrays' room to grow.

    The store's are its columns; its items, and what it finds equal content by, are Python objects.
    """
    members, store = pool._members, pool._store
    near = members.main
    inner = getattr(near.index, "inner", near.index)
    table, rows = near.table, inner.rows
    ids = [] if near._ids is None else [near._ids]
    parts = {
        "neighbours, gains and roles": [
            table._low, table._high, table._far, near._first, members.role, *ids
        ],
        "index": [rows.at, rows.alive, rows._place],
        "columns of the store": [store.ids(), *store._columns.values()],
    }  # fmt: skip
    return {k: round(sum(a.nbytes for a in v) / store.size, 1) for k, v in parts.items()}


def effort(pool: Growth) -> dict[str, Any]:
    """What the index does for the recall that it has."""
    inner = getattr(pool._members.main.index, "inner", None)
    lists = getattr(inner, "lists", None)
    if inner is None or lists is None:
        return {"kind": getattr(inner, "kind", "exact")}
    return {
        "lists": len(lists.centroids),
        "probes": inner.probes,
        "candidates": inner.candidates,
        "its own probe": None if inner.recall is None else inner.recall._asdict(),
    }


def beside(path: Path) -> float:
    """Bytes on the disk that are neither vectors nor payload, for each item."""
    files: list[Any] = [f for f in path.rglob("*") if f.is_file()]
    kept = [f for f in files if f.parent.name not in ("vectors", "payload")]
    return round(sum(f.stat().st_size for f in kept) / (FIRST + MORE), 1)


if __name__ == "__main__":
    main()
