"""Speed and memory of a layer of experts: one-hot dispatch, transformers, and a dense chain.

``python benchmarks/experts_speed.py [--repetitions N] [--patience SECONDS] [--record NAME]``.
Ratios hold inside one run only; forward and backward passes together, two threads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from record import in_turns, peak_bytes, summary, write
from sparing.experts.experts import Experts
from sparing.experts.routing import Routing

SEED = 0


class Case:
    """A layer, its tokens and a routing, drawn from the seed."""

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int,
        slots: int,
        k: int,
        *,
        exact: bool,
        dtype: torch.dtype = torch.float32,
        gated: bool = True,
    ) -> None:
        draw = torch.Generator().manual_seed(SEED)
        self.experts = Experts(dim, width, slots, gated=gated)
        self.experts.init_(generator=draw)
        self.experts.to(dtype)
        scores = torch.rand(tokens, slots, generator=draw)
        if exact:
            self.choice = scores.topk(k).indices
            self.chosen = torch.zeros(tokens, slots).bool().scatter_(1, self.choice, True)
        else:
            self.chosen = scores < k / slots
        self.weights = torch.rand(tokens, slots, generator=draw).to(dtype).requires_grad_()
        self.x = torch.randn(tokens, dim, generator=draw).to(dtype).requires_grad_()
        self.grad = torch.randn(tokens, dim, generator=draw).to(dtype)
        self.rows = int(self.chosen.sum())
        self.forget: list[Tensor] = [self.x, self.weights, *self.experts.parameters()]

    def clear(self) -> None:
        for tensor in self.forget:
            tensor.grad = None

    def ours(self, backend: str = "auto") -> Callable[[], None]:
        def run() -> None:
            routing = Routing(self.chosen, self.weights)
            self.experts(self.x, routing, backend=backend).backward(self.grad)

        return run

    def one_hot(self) -> None:
        """GShard-style dispatch (arXiv 2006.16668) with the capacity that drops nothing."""
        e = self.experts
        place = self.chosen.long().cumsum(0) - 1
        capacity = int(place.max()) + 1
        slot = F.one_hot(place * self.chosen, capacity).to(self.x.dtype)
        combine = torch.einsum("te,tec->tec", self.weights * self.chosen, slot)
        dispatch = combine.bool().to(self.x.dtype)
        taken = torch.einsum("tec,td->ecd", dispatch, self.x)
        up = torch.bmm(taken, e.up.transpose(1, 2))
        if e.gate is None:
            hidden = F.silu(up)
        else:
            hidden = F.silu(torch.bmm(taken, e.gate.transpose(1, 2))) * up
        out = torch.bmm(hidden, e.down.transpose(1, 2))
        torch.einsum("tec,ecd->td", combine, out).backward(self.grad)

    def dense(self) -> Callable[[], None]:
        """One feed-forward net over as many rows as are routed: the same FLOPs in 3 products."""
        e = self.experts
        assert e.gate is not None
        gate, up, down = (nn.Parameter(w[0].detach().clone()) for w in (e.gate, e.up, e.down))
        x = self.x.detach().repeat(-(-self.rows // len(self.x)), 1)[: self.rows].requires_grad_()
        grad = torch.randn_like(x)
        self.forget += [gate, up, down, x]

        def run() -> None:
            F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down).backward(grad)

        return run

    def products(self) -> Callable[[], None]:
        """The 9 products of each expert and nothing else, into memory that is there."""
        e = self.experts
        assert e.gate is not None
        gates, ups, downs = (w.detach().unbind() for w in (e.gate, e.up, e.down))
        counts = self.chosen.sum(0).tolist()
        dtype, width, dim = e.up.dtype, e.width, e.dim
        into_hidden, into_down = (
            torch.empty(width, dim, dtype=dtype),
            torch.empty(dim, width, dtype=dtype),
        )
        x, a, b, out = (torch.randn(self.rows, n).to(dtype) for n in (dim, width, width, dim))

        def run() -> None:
            for expert, rows in enumerate(
                zip(*(t.split(counts) for t in (x, a, b, out)), strict=True)
            ):
                xs, p, q, o = rows
                torch.mm(xs, gates[expert].t(), out=p)
                torch.mm(xs, ups[expert].t(), out=q)
                torch.mm(p, downs[expert].t(), out=o)
                torch.mm(xs, downs[expert], out=p)
                torch.mm(xs.t(), q, out=into_down)
                torch.mm(p.t(), xs, out=into_hidden)
                torch.mm(q.t(), xs, out=into_hidden)
                torch.mm(p, gates[expert], out=o)
                torch.mm(q, ups[expert], out=o)

        return run

    def elementwise(self) -> Callable[[], None]:
        """What the dense chain does besides its products: the gated activation and its backward."""
        e = self.experts
        a, b, grad = (torch.randn(self.rows, e.width).to(e.up.dtype) for _ in range(3))
        a.requires_grad_()
        b.requires_grad_()
        self.forget += [a, b]

        def run() -> None:
            (F.silu(a) * b).backward(grad)

        return run

    def transformers(self) -> Callable[[], None]:
        """transformers' own layer of the same sizes, by its grouped implementation."""
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        e = self.experts
        config = Qwen3MoeConfig(
            hidden_size=e.dim,
            moe_intermediate_size=e.width,
            num_experts=e.count,
            num_experts_per_tok=self.choice.shape[1],
        )
        config._experts_implementation = "grouped_mm"
        theirs = Qwen3MoeExperts(config).to(e.up.dtype)
        assert e.gate is not None
        with torch.no_grad():
            theirs.gate_up_proj.copy_(torch.cat([e.gate, e.up], 1))
            theirs.down_proj.copy_(e.down)
        self.forget += list(theirs.parameters())

        def run() -> None:
            weights = self.weights.gather(1, self.choice)
            theirs(self.x, self.choice, weights).backward(self.grad)

        return run

    def memory(self) -> dict[str, float]:
        """Peak of both passes over inputs + routed activations + weights + weight gradients.

        Routed activations, for each row: the token, the activation's inputs, the hidden
        activation, the output.
        """
        e = self.experts
        self.clear()
        routing = Routing(self.chosen, self.weights)
        peak = peak_bytes(lambda: e(self.x, routing).backward(self.grad))
        size = e.up.element_size()
        parameters = sum(p.numel() for p in e.parameters())
        inputs = 2 * self.x.numel()
        activations = self.rows * (e.dim + (3 if e.gate is not None else 2) * e.width + e.out_dim)
        held = size * (inputs + parameters)
        allowed = size * (inputs + activations + 2 * parameters)
        return {
            "peak_mib": round((peak + held) / 2**20, 1),
            "sum_mib": round(allowed / 2**20, 1),
            "ratio": round((peak + held) / allowed, 3),
        }


def against_one_hot(turns: dict[str, Any], *, gated: bool) -> dict[str, Any]:
    case = Case(2048, 256, 512, 16, 3, exact=False, gated=gated)
    functions = {
        "ours": case.ours(),
        "one-hot": case.one_hot,
        "ours, grouped": case.ours("grouped"),
        "ours, padded": case.ours("padded"),
    }
    times = in_turns(functions, before=case.clear, **turns)
    return {
        "sizes": "T=2048 d=256 f=512 E=16, each expert takes a token with probability 3/16",
        "gated": gated,
        "mean_k": round(case.rows / 2048, 3),
        "base": "ours",
        "times": summary(times, "ours"),
        "memory": case.memory(),
    }


def against_dense(turns: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    case = Case(4096, 512, 1024, 16, 2, exact=True, dtype=dtype)
    functions = {
        "dense chain": case.dense(),
        "ours": case.ours(),
        "transformers, grouped": case.transformers(),
        "ours, grouped": case.ours("grouped"),
        "products alone": case.products(),
        "elementwise of the dense chain": case.elementwise(),
    }
    times = in_turns(functions, before=case.clear, **turns)
    found = summary(times, "dense chain")
    bound = {}
    for pick, kind in (("median", "wall"), ("min", "wall"), ("min", "cpu")):
        parts = ("products alone", "elementwise of the dense chain")
        least = sum(found[part][kind][pick] for part in parts)
        bound[f"{pick} {kind}"] = round(found["ours"][kind][pick] / least, 3)
    return {
        "sizes": "T=4096 d=512 f=1024 E=16 k=2 SwiGLU",
        "dtype": str(dtype).removeprefix("torch."),
        "base": "dense chain",
        "times": found,
        "ours over products and elementwise": bound,
        "memory": case.memory(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument(
        "--patience", type=float, default=240.0, help="seconds to wait, a case, for a quiet machine"
    )
    parser.add_argument("--record", default="experts-speed")
    options = parser.parse_args()
    torch.set_num_threads(2)
    n = {"repetitions": options.repetitions, "patience": options.patience}
    results = {
        "plain, against one-hot dispatch": against_one_hot(n, gated=False),
        "SwiGLU, against one-hot dispatch": against_one_hot(n, gated=True),
        "float32, against a dense chain": against_dense(n, torch.float32),
        "bfloat16, against a dense chain": against_dense(n, torch.bfloat16),
    }
    path = write(options.record, results, seeds=[SEED])
    for name, case in results.items():
        ratios = {other: found["ratio"] for other, found in case["times"].items()}
        print(name, json.dumps(ratios, indent=1), case["memory"], sep="\n")
    print(path.name)


if __name__ == "__main__":
    main()
