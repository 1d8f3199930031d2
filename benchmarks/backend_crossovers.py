"""Which backend is fastest for which load, on a processor: what choice.py's table is read from.

Every backend on the same random routings, exactly k experts a token: T tokens, E experts, in
single and half precision, forward alone and with backward. One thread, by processor time, so that
other work on the machine disturbs little; medians of calls in turns. Writes
benchmarks/records/backend_crossovers.json.

    python benchmarks/backend_crossovers.py [--repetitions N] [--fit]

``--fit`` measures nothing: it reads the record and prints the table that loses least.
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

DIM, WIDTH = 256, 512
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
CHOSEN = (1, 2, 4)
SLOTS = (8, 16, 64)
DTYPES = ("float32", "bfloat16")
BACKENDS = ("loop", "grouped", "padded", "gathered", "streamed", "dense")
NAME = "backend_crossovers"
MOST_COPIED = 64
"""Rows up to which gathered weights are measured: each row copies an expert, 1.5 MB here."""

MOST_WASTED = 16
"""Dense is measured up to this many times the work that was asked for."""


def sensible(backend: str, tokens: int, k: int, slots: int, grad: bool) -> bool:
    """Whether a measurement could be other than hopeless; what is not measured is not best."""
    if backend == "gathered":
        return tokens * k <= MOST_COPIED
    if backend == "streamed":
        return not grad
    return backend != "dense" or (slots <= MOST_WASTED * k and tokens * slots <= 2**16)


def call(experts: Experts, tokens: int, k: int, grad: bool, backend: str) -> Callable[[], Any]:
    """One pass, or two, of the experts given their routing."""
    draw = torch.Generator().manual_seed(tokens)
    dtype, slots = experts.up.dtype, experts.count
    picked = torch.rand(tokens, slots, generator=draw).topk(k).indices
    chosen = torch.zeros(tokens, slots, dtype=torch.bool).scatter_(1, picked, True)
    weights = torch.rand(tokens, slots, generator=draw)
    x = torch.randn(tokens, DIM, generator=draw).to(dtype).requires_grad_(grad)
    gradient = torch.randn(tokens, DIM, generator=draw).to(dtype)
    routing = Routing.from_map(chosen, weights)
    routing.weights.requires_grad_(grad)
    inputs = [x, routing.weights, *experts.parameters()]

    def forward() -> Any:
        with torch.no_grad():
            return experts(x, routing, backend=backend)

    def both() -> Any:
        return torch.autograd.grad(experts(x, routing, backend=backend), inputs, gradient)

    return both if grad else forward


def repetitions(function: Callable[[], Any], most: int) -> int:
    """Fewer of what takes long: about half a second of work for each function."""
    function()
    start = time.process_time()
    function()
    return max(3, min(most, int(0.5 / max(time.process_time() - start, 1e-6))))


def measure(most: int) -> dict[str, Any]:
    """Microseconds of each backend at each point."""
    points = []
    for dtype, slots in itertools.product(DTYPES, SLOTS):
        experts = Experts(DIM, WIDTH, slots)
        experts.init_(generator=torch.Generator().manual_seed(0))
        experts.to(getattr(torch, dtype))
        for grad, k, tokens in itertools.product((False, True), CHOSEN, TOKENS):
            functions = {
                name: call(experts, tokens, k, grad, name)
                for name in BACKENDS
                if sensible(name, tokens, k, slots, grad)
            }
            n = min(repetitions(function, most) for function in functions.values())
            times = in_turns(functions, repetitions=n, warm_up=1)
            found = {name: spread([s * 1e6 for s in t["cpu"]], 1) for name, t in times.items()}
            points.append(
                {
                    "dtype": dtype,
                    "experts": slots,
                    "k": k,
                    "tokens": tokens,
                    "rows": tokens * k,
                    "grad": grad,
                    "microseconds": found,
                    "best": min(found, key=lambda name: found[name]["median"]),
                }
            )
        print(dtype, slots, time.strftime("%H:%M:%S"), flush=True)
    return {"sizes": f"d={DIM} f={WIDTH} SwiGLU, 1 thread, processor time", "points": points}


def loss(point: dict[str, Any], backend: str) -> float:
    """How many times the best backend's median this backend takes; large if not measured."""
    found = point["microseconds"]
    if backend not in found:
        return 100.0
    best = min(times["median"] for times in found.values())
    return float(found[backend]["median"] / best)


def fit(points: list[dict[str, Any]]) -> None:
    """Print, for each dtype and direction, the two borders of rows an expert that lose least."""
    for dtype, grad in itertools.product(DTYPES, (False, True)):
        here = [p for p in points if p["dtype"] == dtype and p["grad"] == grad]
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


def main() -> None:
    """Measure and write the record, or fit the table to it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--fit", action="store_true")
    asked = parser.parse_args()
    if asked.fit:
        fit(json.loads((RECORDS / f"{NAME}.json").read_text())["results"]["points"])
        return
    torch.set_num_threads(1)
    write(NAME, measure(asked.repetitions), seeds=[0])


if __name__ == "__main__":
    main()
