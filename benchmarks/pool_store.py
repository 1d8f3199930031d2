"""The pool's store: appending, beside the floor of the disk, reading back, and memory an item.

    python benchmarks/pool_store.py [--folder DIR] [--items 200000]

The floor writes the same bytes to one file and forces it to the disk once a batch; the plain way
is a transaction of sqlite3 with a row an item, durable as the store is. Items are short texts: what
their bytes cost is small beside the 256 numbers of each vector.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from record import in_turns, spread, summary, write
from sparing.pool.items import Item, Vectors
from sparing.pool.store import Store, check

DIM, BATCH = 256, 1000


class Batches:
    """New items with vectors, made ahead of what is timed."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.count = 0

    def next(self) -> tuple[list[Item], Vectors]:
        rows = self.rng.standard_normal((BATCH, DIM), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        first = self.count
        self.count += BATCH
        items = [
            Item(key=f"part-1.tar:{i:09d}", text=f"a caption, number {i}")
            for i in range(first, first + BATCH)
        ]
        return items, Vectors(main=rows)


def appending(folder: Path, repetitions: int) -> dict[str, Any]:
    """Seconds of a batch: the store, a plain database, and the bare write."""
    batches, held = Batches(), {}
    store = Store.create(folder / "store", dim=DIM)
    plain = sqlite3.connect(folder / "plain.sqlite", isolation_level=None)
    plain.execute("PRAGMA journal_mode=WAL")
    plain.execute("PRAGMA synchronous=FULL")
    plain.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, key TEXT, text TEXT, vector BLOB)")
    floor = os.open(folder / "floor", os.O_RDWR | os.O_CREAT)

    def prepare() -> None:
        held["items"], held["vectors"] = batches.next()

    def ours() -> None:
        items, vectors = held["items"], held["vectors"]
        store.append(items, vectors, source="s", cursor=items[-1].key)

    def database() -> None:
        plain.execute("BEGIN")
        rows = zip(held["items"], held["vectors"].main, strict=True)
        plain.executemany(
            "INSERT INTO item (key, text, vector) VALUES (?, ?, ?)",
            [(item.key, item.text, row.tobytes()) for item, row in rows],
        )
        plain.execute("COMMIT")

    def bare() -> None:
        os.write(floor, held["vectors"].main.tobytes())
        os.fdatasync(floor)

    functions = {"store": ours, "sqlite3, a row an item": database, "write and sync": bare}
    times = in_turns(functions, repetitions=repetitions, before=prepare)
    store.close()
    plain.close()
    os.close(floor)
    wall = spread(times["store"]["wall"])
    return {
        "times of a batch": summary(times, "store"),
        "items a second, median": round(BATCH / wall["median"]),
        "items a second, fastest": round(BATCH / wall["min"]),
        "items a second of one processor": round(BATCH / float(np.median(times["store"]["cpu"]))),
    }


def growing(folder: Path, items: int) -> dict[str, Any]:
    """One store to its full size: rates at its beginning and end, opening, reading, memory."""
    batches, seconds, processor = Batches(), [], []
    with Store.create(folder / "grown", dim=DIM) as store:
        for _ in range(items // BATCH):
            batch, vectors = batches.next()
            wall, cpu = time.perf_counter(), time.process_time()
            store.append(batch, vectors, source="s")
            seconds.append(time.perf_counter() - wall)
            processor.append(time.process_time() - cpu)
        hashes, named = store._lookups()
        held = sum(array.all.nbytes for array in store._grown) + hashes.bytes + named.bytes
        parts = len(store._state.parts)
    tenth = max(1, len(seconds) // 10)
    rng = np.random.default_rng(1)

    def timed(work: Any) -> float:
        begin = time.perf_counter()
        work()
        return round(time.perf_counter() - begin, 4)

    opened = timed(lambda: Store.open(folder / "grown").close())
    with Store.open(folder / "grown") as reader:
        some = rng.choice(items, 10_000, replace=False)
        out = {
            "items": items,
            "items a second over all": round(items / sum(seconds)),
            "items a second, first tenth": round(tenth * BATCH / sum(seconds[:tenth])),
            "items a second, last tenth": round(tenth * BATCH / sum(seconds[-tenth:])),
            "items a second of one processor": round(items / sum(processor)),
            "seconds of a batch": spread(seconds),
            "files": parts,
            "bytes of memory an item besides vectors": round(held / items, 1),
            "seconds to open for reading": opened,
            "seconds to read 10,000 items": timed(lambda: reader.items(some)),
            "seconds to read 10,000 vectors": timed(lambda: reader.vectors(some)),
            "seconds to read the column of keys": timed(lambda: reader.column("key")),
        }
    out["seconds to forget 100 items"] = timed(lambda: _forget(folder / "grown"))
    out["seconds to check all"] = timed(lambda: check(folder / "grown"))
    return out


def _forget(path: Path) -> None:
    with Store.open(path, write=True) as store:
        store.forget(store.ids()[:100])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=None, help="where to write; the system's own otherwise")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--repetitions", type=int, default=30)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        results = {
            "appending 1,000 items with vectors of 256": appending(folder, given.repetitions),
            "growing": growing(folder, given.items),
        }
    finally:
        shutil.rmtree(folder)
    print(write("pool_store", results, seeds=[0, 1], note="durable at each batch (fdatasync)"))


if __name__ == "__main__":
    main()
