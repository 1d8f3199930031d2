"""Decoding: a few tokens through one expert layer, against the bytes that must be read.

The floor is the active experts' weights, once, over the rate at which this machine reads memory,
measured in the same rounds by a sum and a matrix-vector product over an array far larger than the
cache. Layers are called in turn, as in a model, so that no layer's weights wait in the cache; each
timed pass follows an untimed one of the same layers on another token, as tokens follow tokens.
Also transformers' Mixtral block of the same sizes, by each of its implementations. Writes
benchmarks/records/decoding.json.

    python benchmarks/decoding.py [--patience SECONDS] [--compiled] [--threads 1 2]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sparing
from record import RECORDS, in_turns, spread, write
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer

DIM, WIDTH, EXPERTS, K = 576, 1536, 8, 2
LAYERS = 16
"""Layers called in turn: 1.36 GB of weights in single precision, of which two experts for each
token are 0.34 GB, beyond the cache of 0.26 GB that the measured machine shares with others."""

TOKENS = (1, 2, 4, 8, 16)
METHODS: dict[str, Callable[[], Any]] = {
    "top-k": lambda: sparing.TopK(experts=EXPERTS, k=K),
    "dynmoe": lambda: sparing.TopAny(max_experts=EXPERTS, target_k=K),
}


def build(name: str, dtype: torch.dtype) -> list[ExpertLayer]:
    """Layers in evaluation mode; thresholds of top-any calibrated to open K gates on average."""
    method, layers = METHODS[name](), []
    for seed in range(LAYERS):
        experts = Experts(DIM, WIDTH, EXPERTS)
        experts.init_(generator=torch.Generator().manual_seed(seed))
        layer = ExpertLayer(method.router(DIM, seed), experts)
        with torch.no_grad():
            for batch in range(4):
                draw = torch.Generator().manual_seed(1000 + batch)
                layer.router(torch.randn(512, DIM, generator=draw))
        layer.experts.to(dtype)
        layers.append(layer.eval())
    return layers


def mixtral(implementation: str, layers: list[ExpertLayer]) -> list[nn.Module]:
    """transformers' sparse blocks with the same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=DIM, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=K
    )
    config._experts_implementation = implementation
    blocks = []
    for layer in layers:
        block = MixtralSparseMoeBlock(config).to(layer.experts.up.dtype).eval()
        assert layer.experts.gate is not None
        with torch.no_grad():
            block.gate.weight.copy_(layer.router.similarity)
            block.experts.gate_up_proj.copy_(torch.cat([layer.experts.gate, layer.experts.up], 1))
            block.experts.down_proj.copy_(layer.experts.down)
        blocks.append(block)
    return blocks


def active(layers: list[ExpertLayer], x: Tensor) -> tuple[int, int]:
    """(experts, rows) that the tokens take, summed over the layers."""
    routings = [layer.router(x) for layer in layers]
    return sum(int((r.counts > 0).sum()) for r in routings), sum(r.rows for r in routings)


class Reading:
    """Two ways to read an array once, far larger than any cache."""

    def __init__(self) -> None:
        self.array = torch.ones(2**28 // 1)  # 1 GiB
        self.matrix, self.vector = self.array.view(-1, 2**14), torch.ones(2**14)
        self.out = torch.empty(2**14)
        self.bytes = self.array.numel() * 4

    def functions(self) -> dict[str, Callable[[], Any]]:
        """By name; the results are not needed."""
        return {
            "read: sum": self.array.sum,
            "read: mv": lambda: torch.mv(self.matrix, self.vector, out=self.out),
        }


class Chain(nn.Module):
    """All layers on the same tokens, one after the other."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def chain(layers: list[Any], x: Tensor, *, compiled: bool = False) -> Callable[[], Any]:
    """A call of all layers; compiled, one graph at fixed shapes, as a compiled model has them."""
    call: Any = Chain(layers).eval()
    if compiled:
        call = torch.compile(call, fullgraph=True, dynamic=False)
    turns = itertools.cycle((x.roll(1, -1), x))
    return lambda: call(next(turns))


def measure(
    dtype: torch.dtype, tokens: int, *, compile_too: bool, turns: dict[str, Any]
) -> dict[str, Any]:
    """Times of one layer, and ratios to the floor, of ours and theirs on the same tokens."""
    x = torch.randn(1, tokens, DIM, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    each = 3 * DIM * WIDTH * dtype.itemsize
    reading = Reading()
    functions, counts = reading.functions(), {}
    for name in METHODS:
        layers = build(name, dtype)
        counts[name] = active(layers, x[0])
        functions[name] = chain(layers, x)
        if compile_too:
            functions[f"{name}, compiled"] = chain(layers, x, compiled=True)
            counts[f"{name}, compiled"] = counts[name]
        if name == "top-k":
            for kind in ("eager", "grouped_mm", "batched_mm"):
                theirs = f"transformers {kind}"
                blocks = mixtral(kind, layers)
                functions[theirs], counts[theirs] = chain(blocks, x), counts[name]
                if compile_too and kind != "eager":  # the eager kind cannot be compiled whole
                    functions[f"{theirs}, compiled"] = chain(blocks, x, compiled=True)
                    counts[f"{theirs}, compiled"] = counts[name]
    # process time is what a thread really worked; with two threads only the wall tells
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    with torch.no_grad():
        times = in_turns(functions, untimed=1, **turns)
    rates = {
        name: reading.bytes / spread(times[name][clock], 9)["median"] / 1e9
        for name in reading.functions()
    }
    best = max(rates.values())
    found: dict[str, Any] = {
        "clock": clock,
        "memory rate, GB/s": {name: round(rate, 2) for name, rate in rates.items()},
        "others' share of the machine": spread(
            [share for t in times.values() for share in t["others"]], 3
        ),
    }
    for name, (experts, rows) in counts.items():
        micro = spread([s / LAYERS * 1e6 for s in times[name][clock]], 1)
        floor = experts / LAYERS * each / best / 1e3
        found[name] = {
            "active experts": experts / LAYERS,
            "rows": rows / LAYERS,
            "microseconds a layer": micro,
            "floor, microseconds": round(floor, 1),
            "over the floor": {
                pick: round(micro[pick] / floor, 3) for pick in ("min", "median", "max")
            },
        }
    return found


def recorded(name: str, sizes: str) -> dict[str, Any]:
    """What the record holds of these sizes: a run adds to it, or replaces what it measures."""
    path = RECORDS / f"{name}.json"
    held = json.loads(path.read_text())["results"] if path.exists() else {}
    return {key: found for key, found in held.items() if key != "sizes" and held["sizes"] == sizes}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--record", default="decoding")
    asked = parser.parse_args()
    sizes = f"d={DIM} f={WIDTH} E={EXPERTS} k={K} SwiGLU, {LAYERS} layers in turn"
    results = recorded(asked.record, sizes)
    for threads, dtype, tokens in itertools.product(asked.threads, asked.dtypes, asked.tokens):
        torch.set_num_threads(threads)
        turns = {"repetitions": asked.repetitions, "patience": asked.patience, "warm_up": 1}
        found = measure(
            getattr(torch, dtype), tokens, compile_too=asked.compiled and tokens == 1, turns=turns
        )
        key = f"{dtype}, {tokens} tokens, {threads} threads"
        results[key] = found
        print(key, found["memory rate, GB/s"], found["others' share of the machine"])
        for name, of in found.items():
            if isinstance(of, dict) and "rows" in of:
                print(
                    f"  {name:36} {of['microseconds a layer']['median']:9.1f} us "
                    f"{of['active experts']:5.2f} experts  {of['over the floor']}"
                )
        write(
            asked.record,
            {"sizes": sizes, **results},
            seeds=[0],
        )


if __name__ == "__main__":
    main()
