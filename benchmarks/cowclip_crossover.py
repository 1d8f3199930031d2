"""Which form of the clip is fastest for which table and batch: what ``auto`` is held to.

Counting and clipping a dense gradient of 16 columns: by the rows that occur (ids sorted), by passes
over the table (counts of all rows), and as ``auto`` chooses; ids uniform, and by Zipf's law. About
2 % of the rows that occur are clipped. One thread, processor time, calls in turns, medians. A table
of 10^8 rows needs 6.4 GB for values and as much for gradients, and was not measured.

    python benchmarks/cowclip_crossover.py [--fit]

The record is written after every point; what it holds is not measured again. ``--fit`` measures
nothing and prints which borders lose least.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from record import RECORDS, in_turns, spread, write
from sparing.updates import cowclip, occurrences
from sparing.updates.clip import Threshold, clip_, norms

NAME, WIDTH = "cowclip_crossover", 16
ROWS = (10**4, 10**5, 10**6, 10**7)
FIELDS = (1, 4, 26)
BATCHES = (1024, 8192, 65536)
LAWS = ("uniform", "zipf")
COMBINATIONS = tuple(itertools.product(("rows", "dense"), repeat=2))


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
    for rows, fields, batch, law in itertools.product(ROWS, FIELDS, BATCHES, LAWS):
        yield {"rows": rows, "fields": fields, "batch": batch, "law": law}


def auto(ids: Tensor, grad: Tensor, weight: Tensor, threshold: Threshold) -> None:
    found = occurrences.count(ids, len(weight), "auto")
    form = "rows" if found.occurring() <= cowclip.ROWS_UP_TO * found.rows else "dense"
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
    ids = drawn(point["law"], point["batch"] * point["fields"], rows)
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

    functions = {f"{a}, {b}": combination(a, b) for a, b in COMBINATIONS}
    functions["auto"] = lambda: auto(ids, grad, weight, threshold)
    times = in_turns(functions, repetitions=5 if rows < 10**7 else 3, warm_up=1)
    micro = {name: spread([s * 1e6 for s in kinds["cpu"]], 1) for name, kinds in times.items()}
    median = {name: entry["median"] for name, entry in micro.items()}
    best = min(median["rows, rows"], median["dense, dense"])
    return {
        **point,
        "lookups": ids.numel(),
        "occurring": each.numel(),
        "microseconds": micro,
        "auto_over_best": round(median["auto"] / best, 3),
        "dense_over_auto": round(median["dense, dense"] / median["auto"], 2),
    }


def recorded() -> list[dict[str, Any]]:
    path = RECORDS / f"{NAME}.json"
    return json.loads(path.read_text())["results"]["points"] if path.exists() else []


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the goals ask for."""
    large = [p for p in found if p["rows"] == 10**7 and p["occurring"] <= 10**5]
    growth = [
        b["microseconds"]["auto"]["median"] / a["microseconds"]["auto"]["median"]
        for a in found
        for b in found
        if (a["rows"], b["rows"]) == (10**6, 10**7)
        and all(a[k] == b[k] for k in ("fields", "batch", "law"))
        and a["lookups"] <= 10**5
        and a["law"] == "uniform"
    ]
    return {
        "auto over the faster form, worst": max(p["auto_over_best"] for p in found),
        "dense over auto at 10^7 rows and at most 10^5 that occur, least": min(
            (p["dense_over_auto"] for p in large), default=None
        ),
        "auto at 10^7 over 10^6 rows, uniform ids, at most 10^5 lookups, worst": round(
            max(growth, default=0.0), 2
        ),
    }


def fit(found: list[dict[str, Any]]) -> None:
    """Print the loss of each pair of borders: of lookups over rows, of occurring over rows."""
    shares = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0)
    results = []
    for sort_to, rows_to in itertools.product(shares, repeat=2):
        losses = []
        for p in found:
            a = "rows" if p["lookups"] <= sort_to * p["rows"] else "dense"
            b = "rows" if p["occurring"] <= rows_to * p["rows"] else "dense"
            micro = {name: entry["median"] for name, entry in p["microseconds"].items()}
            best = min(micro["rows, rows"], micro["dense, dense"])
            losses.append(micro[f"{a}, {b}"] / best)
        results.append((max(losses), sum(losses) / len(losses), sort_to, rows_to))
    for line in sorted(results)[:8]:
        print("worst {:.2f} mean {:.3f} sorted up to {:.2f}, rows up to {:.2f}".format(*line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true")
    if parser.parse_args().fit:
        fit(recorded())
        return
    torch.set_num_threads(1)
    done, tables = recorded(), {}
    keys = ("rows", "fields", "batch", "law")
    known = {tuple(point[key] for key in keys) for point in done}
    for point in points():
        if tuple(point[key] for key in keys) in known:
            continue
        done.append(measure(point, tables))
        write(
            NAME,
            {"summary": summary(done), "points": done},
            seeds=[0],
            note="Microseconds of processor time, one thread; counting form, clipping form. "
            "Other work ran on the machine.",
        )
        print(done[-1]["auto_over_best"], point, flush=True)


if __name__ == "__main__":
    main()
