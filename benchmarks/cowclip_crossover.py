"""Which form of the clip is fastest for which table and batch: what ``auto`` is held to.

Counting and clipping a dense gradient of 16 columns: by the rows that occur (ids sorted), by passes
over the table (counts of all rows), and as ``auto`` chooses; ids uniform, and by Zipf's law. About
2 % of the rows that occur are clipped. One thread, processor time, calls in turns; a ratio is the
median of those within a round. Before each call 64 MB are written, so that all find the caches
alike, without the table, as a step of training leaves them: otherwise each finds what the one
before it left, which made ``auto`` seem up to 1.9 times slower than the very form that it chose.
A table of 10^8 rows needs 6.4 GB for values and as much for gradients; it has fewer points, and is
left out where less than 18 GB are free.

    python benchmarks/cowclip_crossover.py [--fit | --again]

The record is written after every point; what it holds is not measured again but with ``--again``.
``--fit`` measures nothing and writes the borders that lose least into the package; measure again
then, since the record tells how ``auto`` did with the borders that it had.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from record import RECORDS, in_turns, spread, write
from sparing.updates import crossover, occurrences
from sparing.updates.clip import Threshold, clip_, norms

NAME, WIDTH = "cowclip_crossover", 16
ROWS, LARGEST, ROOM = (10**4, 10**5, 10**6, 10**7), 10**8, 18 * 2**30
FIELDS = (1, 4, 26)
BATCHES = (1024, 8192, 65536)
NEAR = (0.25, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 4.0)
"""Lookups over rows about which the faster form changes: what the borders are fitted by."""
LAWS = ("uniform", "zipf")
OTHER = torch.zeros(1 << 24)
COMBINATIONS = tuple(itertools.product(("rows", "dense"), repeat=2))
SHARES = (
    0.05,
    0.1,
    0.2,
    0.25,
    0.3,
    0.35,
    0.4,
    0.45,
    0.5,
    0.55,
    0.6,
    0.7,
    0.85,
    1.0,
    1.25,
    1.75,
    3.0,
)
FITTED = Path(crossover.__file__).with_suffix(".json")


def drawn(law: str, size: int, rows: int) -> Tensor:
    """(size,) ids in [0, rows); by Zipf's law with exponent 1.05, spread over the table."""
    draw = torch.Generator().manual_seed(size + rows)
    if law == "uniform":
        return torch.randint(rows, (size,), generator=draw)
    # the inverse of the distribution function of a power law on [1, rows]
    u, a = torch.rand(size, generator=draw, dtype=torch.float64), -0.05
    rank = ((u * (float(rows + 1) ** a - 1) + 1) ** (1 / a)).long().clamp(1, rows) - 1
    return (rank * 2_654_435_761) % rows


def points() -> Any:
    for rows in ROWS:
        sizes = {batch * fields: (fields, batch) for fields in FIELDS for batch in BATCHES}
        if rows < 10**7:
            sizes |= {int(share * rows): (None, None) for share in NEAR}
        for (size, (fields, batch)), law in itertools.product(sizes.items(), LAWS):
            yield {"rows": rows, "lookups": size, "law": law, "fields": fields, "batch": batch}
    if psutil.virtual_memory().available >= ROOM:
        for batch, fields, law in itertools.product((1024, 65536), (1, 26), LAWS):
            size = batch * fields
            yield {"rows": LARGEST, "lookups": size, "law": law, "fields": fields, "batch": batch}


def auto(ids: Tensor, grad: Tensor, weight: Tensor, threshold: Threshold) -> None:
    found = occurrences.count(ids, len(weight), "auto")
    form = "rows" if crossover.by_rows(found.occurring(), found.rows) else "dense"
    clip_(grad, weight, found, threshold, form)


def measure(point: dict[str, Any], tables: dict[int, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    rows = point["rows"]
    if rows not in tables:
        tables.clear()
        draw = torch.Generator().manual_seed(0)
        tables[rows] = (
            torch.randn(rows, WIDTH, generator=draw),
            torch.randn(rows, WIDTH, generator=draw),
        )
    grad, weight = tables[rows]
    ids = drawn(point["law"], point["lookups"], rows)
    found = occurrences.count(ids, rows)
    each, counts = found.sorted()
    # a threshold that 2 % of the rows that occur are above; clipped rows stay clipped at it, so
    # what is written again and again is as much, and the same
    ratio = float(torch.quantile((norms(grad[each[:100_000]]) / counts[:100_000]).double(), 0.98))
    threshold = Threshold(form="fixed", bound=ratio * 0.999)

    def combination(counting: str, clipping: str) -> Callable[[], Any]:
        def call() -> None:
            kept = occurrences.count(ids, rows, counting)
            clip_(grad, weight, kept, threshold, clipping)

        return call

    # far from any border the mixed forms teach nothing
    mixed = point["lookups"] >= rows / 20 and rows < LARGEST
    functions = {f"{a}, {b}": combination(a, b) for a, b in COMBINATIONS if a == b or mixed}
    functions["auto"] = lambda: auto(ids, grad, weight, threshold)
    often = {LARGEST: 2, 10**7: 4, 10**6: 8, 10**4: 60}.get(rows, 20)  # half of them backwards
    times = {
        name: kinds["cpu"]
        for name, kinds in in_turns(
            functions, repetitions=often, warm_up=1, before=lambda: OTHER.add_(1)
        ).items()
    }
    micro = {name: spread([s * 1e6 for s in kept], 1) for name, kept in times.items()}
    best = min(("rows, rows", "dense, dense"), key=lambda name: micro[name]["median"])
    return {
        **point,
        "occurring": each.numel(),
        "microseconds": micro,
        "auto_over_best": over(times["auto"], times[best], 3),
        "dense_over_auto": over(times["dense, dense"], times["auto"], 2),
    }


def over(above: list[float], below: list[float], digits: int) -> float:
    """The median ratio within a round."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), digits)


def counting(rows: int, size: int, law: str) -> dict[str, Any]:
    """Ways to count by the rows that occur: sorting, and without a sort."""
    ids = drawn(law, size, rows)
    plain, place = ids.numpy(), np.zeros(rows, dtype=np.int32)
    order = np.arange(size, dtype=np.int32)

    def first_occurrences() -> None:
        """Whoever wrote last stands for its id; then places in the list of those are counted."""
        place[plain] = order
        found = plain[place[plain] == order]
        place[found] = np.arange(found.size, dtype=np.int32)
        np.bincount(place[plain], minlength=found.size)

    functions = {
        "sort": lambda: occurrences.count(ids, rows, "rows"),
        "torch.unique": lambda: torch.unique(ids, return_counts=True),
        "without a sort": first_occurrences,
        "an array of all rows": lambda: occurrences.count(ids, rows, "dense"),
    }
    times = in_turns(functions, repetitions=5, warm_up=1)
    return {
        "rows": rows,
        "lookups": size,
        "law": law,
        "microseconds": {n: spread([s * 1e6 for s in k["cpu"]], 1) for n, k in times.items()},
    }


def recorded() -> dict[str, Any]:
    path = RECORDS / f"{NAME}.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the goals ask for."""
    large = [p for p in found if p["rows"] >= 10**7 and p["occurring"] <= 10**5]
    growth = [
        b["microseconds"]["auto"]["median"] / a["microseconds"]["auto"]["median"]
        for a in found
        for b in found
        if (a["rows"], b["rows"]) == (10**6, 10**7)
        and a["lookups"] == b["lookups"] <= 10**5
        and a["law"] == b["law"] == "uniform"
    ]
    ratios = sorted(p["auto_over_best"] for p in found)
    return {
        "points": len(found),
        "auto over the faster form, worst": ratios[-1],
        "auto over the faster form, median": statistics.median(ratios),
        "points above 1.2": sum(ratio > 1.2 for ratio in ratios),
        "dense over auto from 10^7 rows and at most 10^5 that occur, least": min(
            (p["dense_over_auto"] for p in large), default=None
        ),
        "auto at 10^7 over 10^6 rows, uniform ids, at most 10^5 lookups, worst": round(
            max(growth, default=0.0), 2
        ),
    }


def fit(found: list[dict[str, Any]]) -> None:
    """Write, for each size of table, the borders whose worst loss, then mean loss, is least."""
    borders: dict[str, Any] = {"format": crossover.FORMAT, "sorted": [], "rows": []}
    last = (0.0, 0.0)
    for rows in ROWS:
        here = [p for p in found if p["rows"] == rows]
        results = []
        for sort_to, rows_to in itertools.product(SHARES, repeat=2):
            losses = []
            for p in here:
                a = "rows" if p["lookups"] <= sort_to * rows else "dense"
                b = "rows" if p["occurring"] <= rows_to * rows else "dense"
                micro = {name: entry["median"] for name, entry in p["microseconds"].items()}
                best = min(micro["rows, rows"], micro["dense, dense"])
                losses.append(micro[f"{a}, {b}"] / best)
            results.append((max(losses), statistics.mean(losses), sort_to, rows_to))
        worst, mean, *_ = min(results)
        # several may do as well, since points are few: the middle one of them
        alike = [r[2:] for r in results if r[:2] == (worst, mean)]
        # or that of smaller tables: no point of the largest comes near a border
        sort_to, rows_to = last if last in alike else alike[len(alike) // 2]
        last = sort_to, rows_to
        print(f"{rows:>9,} rows: worst {worst:.2f}, mean {mean:.3f}, {sort_to}, {rows_to}")
        borders["sorted"].append([rows, sort_to])
        borders["rows"].append([rows, rows_to])
    lines = [f' "{name}": {json.dumps(value)}' for name, value in borders.items()]
    FITTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    before = {} if options.again else recorded()
    done: list[dict[str, Any]] = before.get("points", [])
    if options.fit:
        fit(done)
        return
    torch.set_num_threads(1)
    tables: dict[int, tuple[Tensor, Tensor]] = {}
    ways = [
        counting(rows, size, law)
        for rows, size, law in itertools.product((10**6, 10**7), (8192, 26 * 65536), LAWS)
    ]
    known = {(p["rows"], p["lookups"], p["law"]) for p in done}
    for point in points():
        if (point["rows"], point["lookups"], point["law"]) in known:
            continue
        done.append(measure(point, tables))
        write(
            NAME,
            {"summary": summary(done), "counting": ways, "points": done},
            seeds=[0],
            note="Microseconds of processor time, one thread; counting form, clipping form. "
            "Other work ran on the machine.",
        )
        print(done[-1]["auto_over_best"], point, flush=True)


if __name__ == "__main__":
    main()
