"""Whole layers in a compiled graph: no breaks, no recompilation, the same numbers as without.

With "aot_eager" the graph is traced and differentiated, but no code is generated for it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sparing
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own

DIM, WIDTH, SLOTS, TOKENS = 16, 32, 4, 24
METHODS: dict[str, Any] = {
    "top-k": lambda: sparing.TopK(experts=SLOTS, k=2),
    "top-any": lambda: sparing.TopAny(max_experts=SLOTS, target_k=2),
    "top-any, output means": lambda: sparing.TopAny(max_experts=SLOTS, closed_gates="mean"),
    "top-any, published": lambda: sparing.TopAny(max_experts=SLOTS, published=True),
}


def build(name: str, *, calibrated: bool = True) -> ExpertLayer:
    method = METHODS[name]()
    experts = Experts(DIM, WIDTH, SLOTS)
    experts.init_(generator=torch.Generator().manual_seed(0))
    layer = ExpertLayer(method.router(DIM, 0), experts)
    if calibrated:
        for seed in range(4):
            layer.router(tokens(seed, 64))
    return layer


def tokens(seed: int, count: int = TOKENS) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def counted(module: Any, backend: str, **options: Any) -> tuple[Any, Any]:
    """The module compiled whole, and what counts its compilations."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, backend=counter, fullgraph=True, **options), counter


def step(call: Any, layer: ExpertLayer, x: Tensor) -> list[Tensor]:
    """Output, auxiliary losses, and all gradients of one training pass."""
    x = x.clone().requires_grad_()
    y = call(x)
    losses = layer.take_losses()
    total = y.float().square().sum() + sum(losses.values())
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [
        y.detach(),
        *(v.detach() for v in losses.values()),
        *(g for g in grads if g is not None),
    ]


def seen(layer: ExpertLayer) -> list[Tensor]:
    """All that the layer keeps of training passes."""
    kept = [v for v in vars(layer.record).values() if isinstance(v, Tensor)]
    return [v.clone() for v in (*kept, *layer.buffers(), *layer.router.parameters())]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def decodes(name: str, backend: str) -> None:
    layer = build(name).eval()
    call, counter = counted(layer, backend, dynamic=False)
    sizes = set()
    with torch.no_grad():
        for seed in range(12):
            x = tokens(seed, 1)
            sizes.add(layer.router(x).rows)
            same([call(x)], [layer(x)])
    assert counter.frame_count == 1
    assert len(sizes) > 1 or name == "top-k"


def trains(name: str, backend: str) -> None:
    layer = build(name, calibrated=False)
    twin = copy.deepcopy(layer)
    call, counter = counted(twin, backend)
    for seed in range(6):  # the thresholds move in the first four
        x = tokens(seed)
        same(step(call, twin, x), step(layer, layer, x))
        same(seen(twin), seen(layer))
    assert int(layer.record.costs[2]) == 6 * TOKENS
    assert counter.frame_count == 1


def test_decoding_is_one_graph_whatever_the_routing() -> None:
    decodes("top-any", "aot_eager")


def test_training_is_one_graph_whatever_the_routing() -> None:
    trains("top-any", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_generated_code_decodes_alike(name: str) -> None:
    decodes(name, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_generated_code_trains_alike(name: str) -> None:
    trains(name, "inductor")


@pytest.mark.slow
def test_padding_and_domains_in_a_graph() -> None:
    layer = build("top-any")
    twin = copy.deepcopy(layer)
    call, _counter = counted(twin, "aot_eager")
    for one in (layer, twin):
        one.begin(torch.arange(TOKENS).view(2, -1) % 12 < 9)
        one.domain, one.domains = torch.tensor([1, 0]), 2
    x = tokens(9).view(2, -1, DIM)
    same(step(call, twin, x), step(layer, layer, x))
    same(seen(twin), seen(layer))
    assert int(layer.record.costs[2]) == 18


def rounds(call: Any, layer: ExpertLayer) -> list[Tensor]:
    found = []
    for seed in range(2):
        found += step(call, layer, tokens(seed))
    return found + seen(layer)


@pytest.mark.slow
def test_a_checkpoint_around_a_compiled_layer_counts_once() -> None:
    layer = build("top-any")
    twin = copy.deepcopy(layer)
    call, _counter = counted(twin, "aot_eager")
    found = rounds(lambda x: checkpoint(call, x, use_reentrant=False), twin)
    same(found, rounds(layer, layer))


@pytest.mark.slow
def test_a_compiled_checkpoint_counts_once() -> None:
    layer = build("top-any")
    twin = copy.deepcopy(layer)
    from torch._dynamo import config

    with config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        call, counter = counted(lambda x: checkpoint(twin, x, use_reentrant=False), "aot_eager")
        same(rounds(call, twin), rounds(layer, layer))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_in_a_graph(autocast: bool) -> None:
    layer = build("top-any")
    if not autocast:
        layer.experts.bfloat16()
    twin = copy.deepcopy(layer)
    call, _counter = counted(twin, "aot_eager")
    x = tokens(3) if autocast else tokens(3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        same(step(call, twin, x), step(layer, layer, x), 1e-2)
    same(seen(twin), seen(layer), 1e-2)
