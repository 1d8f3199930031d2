"""Small top-any routers and layers, and what tests ask of a routing."""

from __future__ import annotations

from typing import Any

import torch
from planted import small_layer
from torch import Tensor

from sparing.experts.layer import ExpertLayer
from sparing.experts.losses import LossWeights
from sparing.experts.routing import Routing
from sparing.experts.top_any import TopAnyOptions, TopAnyRouter

EDGES: list[dict[str, Any]] = [
    {},
    {"published": True},
    {"weights": "score", "closed_gates": "mean"},
]
EVERY_LOSS = LossWeights(diversity=1, simplicity=1, balance=1, z=1, efficiency=1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def router(dim: int = 8, seed: int = 0, **options: Any) -> TopAnyRouter:
    """A router in training whose thresholds start at 0, unless told otherwise."""
    chosen = TopAnyOptions(**({"calibration": 0} | options))
    return TopAnyRouter(dim, chosen, seed).train()


def map_of(routing: Routing, tokens: int, slots: int) -> Tensor:
    """(T, E), the weights where there are rows and 0 elsewhere."""
    found = torch.zeros(tokens, slots, dtype=routing.weights.dtype)
    found[routing.tokens, routing.experts] = routing.weights.detach()
    return found


def same_rows(left: Routing, right: Routing) -> bool:
    return left.tokens.equal(right.tokens) and left.experts.equal(right.experts)


def plain_expert(layer: ExpertLayer, x: Tensor, expert: int) -> Tensor:
    net = {name: weight[expert] for name, weight in layer.experts.slots().items()}
    hidden = torch.relu(x @ net["up"].t() + net["up_bias"])
    return hidden @ net["down"].t() + net["down_bias"]


def double_layer(**options: Any) -> ExpertLayer:
    layer = small_layer(5, 4, 6, calibration=0, losses=LossWeights(), **options).double().train()
    with torch.no_grad():
        layer.router.similarity.copy_(normal(5, 6, seed=1, dtype=torch.float64))
        layer.router.threshold.copy_(torch.tensor([0.1, 0.3, 0.25, 0.2, -1.0]))
        if layer.router.tracks_outputs:
            layer.output_mean.copy_(normal(5, 6, seed=4, dtype=torch.float64))
    return layer


def routes_in_single(made: Any) -> None:
    """A router for tokens of size 8 computes in float32, whatever tokens are or autocast says."""
    x = normal(40, 8).bfloat16()
    half, single = made(x), made(x.float())
    assert half.weights.dtype == torch.float32
    assert half.weights.equal(single.weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made(x.float())
    assert cast.weights.equal(single.weights)
    assert half.experts.equal(cast.experts)
