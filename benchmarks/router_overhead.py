"""What routing costs beside the experts: router, routing build, records, and the controller.

Forward and backward of a whole expert layer against its experts given a finished routing, at
T=4096, d=512, f=1024, E=16, k=2, SwiGLU, in fp32 and under bf16 autocast; and the Python calls of
both at two numbers of tokens. Writes benchmarks/records/router-overhead.json.

    python benchmarks/router_overhead.py
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

import sparing
from record import in_turns, spread, write
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer

TOKENS, DIM, WIDTH, EXPERTS, K = 4096, 512, 1024, 16, 2
METHODS = {
    "dynmoe": sparing.TopAny(max_experts=EXPERTS, target_k=K),
    "top-k": sparing.TopK(experts=EXPERTS, k=K),
}


def build(method: Any) -> tuple[ExpertLayer, sparing.ExpertController]:
    """A layer in training mode, its thresholds calibrated, and its controller."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = ExpertLayer(method.router(DIM, 0), Experts(DIM, WIDTH, EXPERTS), name="layer")
    return layer, sparing.ExpertController(
        [("layer", layer)], getattr(method.options, "adapt", None)
    )


def measure(method: Any, dtype: torch.dtype, repetitions: int) -> dict[str, Any]:
    """Seconds of the whole step and of the experts alone, and the share that is routing."""
    layer, controller = build(method)
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1), requires_grad=True)
    grad = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2))
    bf16 = dtype == torch.bfloat16
    step = 0

    def whole() -> None:
        nonlocal step
        step += 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y: Tensor = layer(x)
        losses = list(layer.take_losses().values())
        torch.autograd.backward([y, *losses], [grad.to(y.dtype), *[None] * len(losses)])
        controller.step(step)

    for _ in range(5):  # calibrate, and let thresholds settle
        whole()
    with torch.no_grad():
        routing = layer.router(x)
    # the same rows in every backward pass, with weights that nothing lies behind
    routing._rows = routing.tokens, routing.experts, routing.weights.detach().requires_grad_()

    def experts_alone() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y = layer.experts(x, routing)
        y.backward(grad.to(y.dtype))

    times = in_turns(
        {"whole": whole, "experts alone": experts_alone},
        repetitions=repetitions,
        before=lambda: layer.zero_grad(set_to_none=True),
    )
    pairs = zip(times["whole"]["cpu"], times["experts alone"]["cpu"], strict=True)
    return {
        "rows per token": routing.rows / TOKENS,
        "times": {name: {kind: spread(v) for kind, v in t.items()} for name, t in times.items()},
        "routing, share of the layer by CPU time": spread(
            [1 - alone / all_ for all_, alone in pairs]
        ),
        "routing, share of the layer by median": round(
            1
            - spread(times["experts alone"]["cpu"], 9)["median"]
            / spread(times["whole"]["cpu"], 9)["median"],
            4,
        ),
    }


def python_calls(method: Any, tokens: int) -> int:
    """Python and C functions called in one step of the layer and its controller."""
    layer, controller = build(method)
    x = torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(1), requires_grad=True)
    calls = 0

    def count(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for step in range(1, 8):
        if step == 7:
            sys.setprofile(count)
        routing = layer.router(x)
        layer.record.add(x, routing, layer.router.active)
        controller.step(step)
        sys.setprofile(None)
    return calls


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    for name, method in METHODS.items():
        results[name] = {
            "fp32": measure(method, torch.float32, asked.repetitions),
            "bf16 autocast": measure(method, torch.bfloat16, asked.repetitions),
            "python calls of one step": {t: python_calls(method, t) for t in (256, 4096)},
        }
        for kind in ("fp32", "bf16 autocast"):
            share = results[name][kind]["routing, share of the layer by median"]
            print(f"{name} {kind}: routing is {share:.1%} of the layer")
        print(f"{name}: python calls {results[name]['python calls of one step']}")
    write("router-overhead", results, seeds=[0])


if __name__ == "__main__":
    main()
