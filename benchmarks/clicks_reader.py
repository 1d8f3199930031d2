"""How fast logs of clicks are read into tensors, and how long training waits for them.

    python benchmarks/clicks_reader.py [--rows 2000000] [--repetitions 5] [--steps 150]

Parquet of 10 columns (8 categories of which 4 are texts, a number, the label) in row groups of
100,000 rows, and CSV of the same columns, made by a seeded generator: rows and cells a second from
files to batches of tensors, vocabulary given, beside pyarrow's decoding alone, in turns. The pass
that makes the vocabulary is timed once. Starvation: the share of the time that a loop of training
waits for streamed batches, the model being a table of vectors and a network as DeepFM's.

Rates are of the CPU time of the process, all of its threads together: rows a second of one core.
Beside them those of wall time, which say little on a machine that others use, and what others took.

Writes benchmarks/records/clicks_reader.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import nn

from record import in_turns, spread, write
from sparing.tasks.clicks.files import LogFiles
from sparing.tasks.clicks.read import find_schema, read
from sparing.tasks.clicks.schema import Schema
from sparing.tasks.clicks.shuffle import Batches
from sparing.tasks.clicks.split import ByHash

SIZES = (10, 300, 5_000, 60_000)
"""Values of the numbers, and of the texts."""
BATCH = 8192
WHOLE = ByHash(development=0, test=0)


def table(rows: int) -> pa.Table:
    """A log of that many rows, values by a power law."""
    generator = np.random.default_rng(0)
    columns: dict[str, Any] = {"click": generator.integers(0, 2, rows)}
    for size in SIZES:
        drawn = (size ** generator.random((2, rows))).astype(np.int64)
        columns[f"id_{size}"] = drawn[0]
        words = pa.array([f"value {i:06d}" for i in range(size + 1)])
        columns[f"text_{size}"] = words.take(pa.array(drawn[1]))
    columns["number"] = generator.normal(size=rows)
    return pa.table(columns)


def rates(times: dict[str, list[float]], rows: int, columns: int) -> dict[str, Any]:
    """Millions of rows and of cells a second."""
    return {
        f"million {unit} a second, {kind}": spread([rows * by / t / 1e6 for t in times[kind]], 3)
        for kind in ("wall", "cpu")
        for unit, by in (("rows", 1), ("cells", columns))
    } | {"share of the machine that others took": spread(times["others"], 3)}


def reading(path: Path, schema: Schema, rows: int, repetitions: int) -> dict[str, Any]:
    """Files to batches, beside decoding alone."""
    begun = time.process_time()
    log = read(path, schema, WHOLE, hold="memory")
    both = time.process_time() - begun
    vocabulary = log.vocabulary
    del log

    def decode() -> None:
        for _ in LogFiles(path, schema).pieces():
            pass

    def batches() -> None:
        files = LogFiles(path, schema)
        if files.parquet:
            # each row is decoded, encoded, mixed and made a tensor
            from sparing.tasks.clicks.held import Streamed

            counts = np.array([block.rows for block in files.blocks])
            source: Any = Streamed(files, WHOLE, vocabulary, counts)
        else:
            source = read(path, schema, WHOLE, vocabulary=vocabulary, hold="memory").train
        total = sum(len(b["labels"]) for b in Batches(source, BATCH))
        assert total == rows, total

    times = in_turns({"decode": decode, "tensors": batches}, repetitions=repetitions, warm_up=1)
    columns = len(schema.columns)
    return {
        "to tensors": rates(times["tensors"], rows, columns),
        "decoding alone": rates(times["decode"], rows, columns),
        "CPU seconds of vocabulary and encoding, two passes": round(both, 2),
    }


class Network(nn.Module):
    """Vectors of 10 numbers and 400-400-400, the published sizes of DeepFM's deep part."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.vectors = nn.Embedding(sum(sizes), 10, sparse=True)
        self.offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        widths = (10 * len(sizes) + 1, 400, 400, 400)
        layers = [
            layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())
        ]
        self.deep = nn.Sequential(*layers, nn.Linear(400, 1))

    def forward(self, ids: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        vectors = self.vectors(ids + self.offsets).flatten(1)
        return self.deep(torch.cat([vectors, numeric], 1)).squeeze(1)


def starved(path: Path, schema: Schema, steps: int) -> dict[str, Any]:
    """The share of the time that training waits for rows, the first batch apart."""
    log = read(path, schema, WHOLE, hold="stream")
    model = Network(log.vocabulary.sizes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = Batches(log.train, BATCH)
    begun = first = 0.0
    step = 0
    for batch in batches:
        if step == 0:
            begun, first = time.perf_counter(), batches.waited
        logits = model(batch["ids"], batch["numeric"])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step == steps:
            break
    took, waited = time.perf_counter() - begun, batches.waited - first
    return {
        "steps": step,
        "batch": BATCH,
        "seconds": round(took, 2),
        "share waited": round(waited / took, 5),
        "seconds for the first batch": round(first, 3),
    }


def main() -> None:
    """Make the files, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = table(given.rows)
        parquet, csv = Path(folder, "log.parquet"), Path(folder, "log.csv")
        pyarrow.parquet.write_table(made, parquet, row_group_size=100_000)
        pyarrow.csv.write_csv(made, csv)
        del made
        schema = find_schema(parquet, "click")
        for name, path in (("Parquet", parquet), ("CSV", csv)):
            results[name] = reading(path, schema, given.rows, given.repetitions)
            print(name, results[name], flush=True)
        results["training on streamed Parquet"] = starved(parquet, schema, given.steps)
        print(results["training on streamed Parquet"], flush=True)
    note = (
        f"{given.rows:,} rows of 10 columns, one thread each for arrow and torch; batches are made "
        "by a second thread. Targets, a second of CPU time of the process: Parquet 3 million rows "
        "of 10 columns, CSV 10 million cells, both to tensors. The share waited is of wall time, "
        "target 2 %."
    )
    write("clicks_reader", results, seeds=[0], note=note)


if __name__ == "__main__":
    main()
