"""Which backend is fastest for which load, on a processor: what choice.py's table is read from.

Every backend on the same random routings, exactly k experts a token, in single and half precision,
forward alone and with backward. One thread, by processor time, so that other work on the machine
disturbs little; medians of calls in turns. The record is written after every point, and what it
holds is not measured again: stop it whenever you like, or run it in slices.

    python benchmarks/backend_crossovers.py [--slice SECONDS] [--fit]

``--fit`` measures nothing: it reads the record and prints the borders that lose least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from record import RECORDS, in_turns, spread, write
from sparing.experts.experts import Experts
from sparing.experts.routing import Routing

TOKENS = (1, 4, 16, 64, 256, 1024)
LOADS = (
    # dim, width, experts, k, tokens
    (256, 512, 8, 2, TOKENS),
    (256, 512, 64, 4, TOKENS),
    (576, 1536, 8, 2, TOKENS[:-1]),
)
DTYPES = ("float32", "bfloat16")
BACKENDS = ("loop", "grouped", "padded", "gathered", "streamed")
NAME = "backend_crossovers"
MOST_COPIED = 64
"""Rows up to which gathered weights are measured: each row copies an expert's."""

SECONDS = 0.25
"""About so long each backend is measured at each point."""


def sensible(backend: str, rows: int, grad: bool) -> bool:
    """Whether a measurement could be other than hopeless; what is not measured is not best."""
    if backend == "gathered":
        return rows <= MOST_COPIED
    return backend != "streamed" or not grad


def call(experts: Experts, tokens: int, k: int, grad: bool, backend: str) -> Callable[[], Any]:
    """One pass, or two, of the experts given their routing."""
    draw = torch.Generator().manual_seed(tokens)
    dtype, slots = experts.up.dtype, experts.count
    picked = torch.rand(tokens, slots, generator=draw).topk(k).indices
    chosen = torch.zeros(tokens, slots, dtype=torch.bool).scatter_(1, picked, True)
    weights = torch.rand(tokens, slots, generator=draw)
    x = torch.randn(tokens, experts.dim, generator=draw).to(dtype).requires_grad_(grad)
    gradient = torch.randn(tokens, experts.dim, generator=draw).to(dtype)
    routing = Routing(chosen, weights)
    routing.weights.requires_grad_(grad)
    inputs = [x, routing.weights, *experts.parameters()]

    def forward() -> Any:
        with torch.no_grad():
            return experts(x, routing, backend=backend)

    def both() -> Any:
        return torch.autograd.grad(experts(x, routing, backend=backend), inputs, gradient)

    return both if grad else forward


def repetitions(function: Callable[[], Any]) -> int:
    """Fewer of what takes long."""
    function()
    start = time.process_time()
    function()
    return max(3, min(15, int(SECONDS / max(time.process_time() - start, 1e-6))))


def points() -> Any:
    """Every point to measure, as the record describes it, without its figures."""
    for dtype, (dim, width, experts, k, tokens), grad in itertools.product(
        DTYPES, LOADS, (False, True)
    ):
        for count in tokens:
            yield {
                "dtype": dtype,
                "dim": dim,
                "width": width,
                "experts": experts,
                "k": k,
                "tokens": count,
                "rows": count * k,
                "grad": grad,
            }


def measure(point: dict[str, Any], experts: Experts) -> dict[str, Any]:
    """The point with the microseconds of each backend."""
    functions = {
        name: call(experts, point["tokens"], point["k"], point["grad"], name)
        for name in BACKENDS
        if sensible(name, point["rows"], point["grad"])
    }
    n = min(repetitions(function) for function in functions.values())
    times = in_turns(functions, repetitions=n, warm_up=1)
    found = {name: spread([s * 1e6 for s in t["cpu"]], 1) for name, t in times.items()}
    best = min(found, key=lambda name: found[name]["median"])
    return {**point, "microseconds": found, "best": best}


def recorded() -> list[dict[str, Any]]:
    """The points that the record holds."""
    path = RECORDS / f"{NAME}.json"
    return json.loads(path.read_text())["results"]["points"] if path.exists() else []


def run(seconds: float) -> None:
    """Measure what the record lacks, for about so many seconds."""
    start, done = time.perf_counter(), recorded()
    keys = ("dtype", "dim", "width", "experts", "k", "tokens", "grad")
    known = {tuple(point[key] for key in keys) for point in done}
    experts, built = None, None
    for point in points():
        if tuple(point[key] for key in keys) in known:
            continue
        if time.perf_counter() - start > seconds:
            print("time is over; run it again for the rest")
            return
        if built != (point["dtype"], point["dim"], point["experts"]):
            built = (point["dtype"], point["dim"], point["experts"])
            experts = Experts(point["dim"], point["width"], point["experts"])
            experts.init_(generator=torch.Generator().manual_seed(0))
            experts.to(getattr(torch, point["dtype"]))
        assert experts is not None
        done.append(measure(point, experts))
        what = "SwiGLU, 1 thread, processor time, microseconds"
        write(NAME, {"what": what, "points": done}, seeds=[0])
        print(done[-1]["best"], point, flush=True)
    print("complete")


def loss(point: dict[str, Any], backend: str) -> float:
    """How many times the best backend's median this backend takes; large if not measured."""
    found = point["microseconds"]
    if backend not in found:
        return 100.0
    best = min(times["median"] for times in found.values())
    return float(found[backend]["median"] / best)


def fit(found: list[dict[str, Any]]) -> None:
    """Print, for each dtype and direction, the two borders of rows an expert that lose least."""
    for dtype, grad in itertools.product(DTYPES, (False, True)):
        here = [p for p in found if p["dtype"] == dtype and p["grad"] == grad]
        borders = sorted({p["rows"] / p["experts"] for p in here})
        names = [name for name in BACKENDS if any(name in p["microseconds"] for p in here)]
        costs = {
            name: [(p["rows"] / p["experts"], max(0.0, loss(p, name) - 1.05)) for p in here]
            for name in names
        }
        best: tuple[float, Any] = (1e9, None)
        for low, high in itertools.combinations([0.0, *borders], 2):
            chosen, total = [], 0.0
            for start, stop in ((-1.0, low), (low, high), (high, 1e9)):
                part = {n: sum(c for r, c in costs[n] if start < r <= stop) for n in names}
                name = min(part, key=lambda n: part[n])
                chosen.append(name)
                total += part[name]
            if total < best[0] - 1e-9:
                best = (total, (low, high, chosen))
        print(dtype, "with backward" if grad else "forward", best)
        for p in sorted(here, key=lambda p: p["rows"] / p["experts"]):
            ratios = {name: round(loss(p, name), 2) for name in p["microseconds"]}
            print("   ", p["rows"] / p["experts"], (p["dim"], p["experts"], p["tokens"]), ratios)


def main() -> None:
    """Measure and write the record, or fit the table to it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slice", type=float, default=1e9)
    parser.add_argument("--fit", action="store_true")
    asked = parser.parse_args()
    if asked.fit:
        fit(recorded())
        return
    torch.set_num_threads(1)
    run(asked.slice)


if __name__ == "__main__":
    main()
