"""Runs the Triton backend in Triton's interpreter against the dense reference, in float64.

A process of its own: the interpreter is chosen by the environment before triton is imported.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from sparing.experts.experts import Experts
from sparing.experts.routing import Routing

KINDS: list[dict[str, Any]] = [
    {"gated": True},
    {"gated": True, "bias": True, "activation": "relu"},
    {"gated": False, "bias": True, "activation": "gelu"},
]


def passes(experts: Experts, chosen: Tensor, seed: int, backend: str) -> list[Tensor]:
    """Output, sums, and gradients of tokens, weights and parameters, in double precision."""
    draw = torch.Generator().manual_seed(seed)
    dtype = experts.up.dtype
    x = torch.randn(chosen.shape[0], experts.dim, generator=draw).to(dtype).requires_grad_()
    weights = torch.rand(chosen.shape, generator=draw).to(dtype).requires_grad_()
    grad = torch.randn(chosen.shape[0], experts.out_dim, generator=draw).to(dtype)
    routing = Routing(chosen, weights)
    y, sums = experts(x, routing, backend=backend, want_means=True)
    inputs = [x, weights, *experts.parameters()]
    grads = torch.autograd.grad(y, inputs, grad, allow_unused=True)
    kept = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]
    return [tensor.detach().double() for tensor in (y, sums, *kept)]


def check(name: str, chosen: Tensor, dim: int, width: int, kind: dict[str, Any]) -> None:
    """Compare one routing; also without a gradient, where other kernels' branches are taken."""
    experts = Experts(dim, width, chosen.shape[1], **kind)
    experts.init_(generator=torch.Generator().manual_seed(1))
    found = passes(experts, chosen, 2, "scattered")
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(chosen.shape[0], dim, generator=draw)
    weights = torch.rand(chosen.shape, generator=draw)
    with torch.no_grad():
        alone = experts(x, Routing(chosen, weights), backend="scattered").double()
    expected = passes(experts.double(), chosen, 2, "dense")
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            one, other, atol=1e-5, rtol=1e-5, msg=lambda m, p=place: f"{name}, tensor {p}: {m}"
        )
    torch.testing.assert_close(alone, expected[0], atol=1e-5, rtol=1e-5)


def half() -> None:
    """Half precision stays near the reference, and sums are accumulated in single."""
    experts = Experts(20, 36, 3, bias=True)
    experts.init_(generator=torch.Generator().manual_seed(3))
    experts.bfloat16()
    chosen = torch.rand(30, 3, generator=torch.Generator().manual_seed(3)) < 0.5
    found = passes(experts, chosen, 4, "scattered")
    expected = passes(experts.double(), chosen, 4, "dense")
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one / scale, other / scale, atol=0.03, rtol=0.0)


def main() -> None:
    """All routings; prints how many when every one agreed."""
    draw = torch.Generator().manual_seed(0)
    one_expert = torch.zeros(70, 4, dtype=torch.bool)
    one_expert[:, 2] = True
    empty_between = torch.rand(40, 5, generator=draw) < 0.6
    empty_between[:, [0, 3]] = False
    routings = {
        "random": torch.rand(37, 4, generator=draw) < 0.5,
        "sparse": torch.rand(33, 6, generator=draw) < 0.1,
        "full": torch.ones(20, 3, dtype=torch.bool),
        "no rows": torch.zeros(5, 3, dtype=torch.bool),
        "no tokens": torch.zeros(0, 3, dtype=torch.bool),
        "one token": torch.tensor([[False, True, False, True]]),
        "all on one expert": one_expert,
        "empty experts": empty_between,
    }
    count = 0
    for (name, chosen), (number, kind) in itertools.product(routings.items(), enumerate(KINDS)):
        dim, width = ((20, 70), (7, 33), (64, 32))[number]
        check(f"{name}, {kind}", chosen, dim, width, kind)
        count += 1
    half()
    print(count)


if __name__ == "__main__":
    main()
