"""Whole layers in a compiled graph: no breaks, no recompilation, the same numbers as without.

With "aot_eager" the graph is traced and differentiated, but no code is generated for it. Noise is
drawn by an operator, so that its numbers too are those of the same passes without a graph.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sparing
from sparing.core import registry
from sparing.experts.always import AlwaysOn
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer
from sparing.experts.method import RoutedExperts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own

DIM, WIDTH, SLOTS, TOKENS = 16, 32, 4, 24
FOUR: dict[str, Any] = {"experts": SLOTS}
METHODS: dict[str, RoutedExperts] = {
    "top-k": sparing.TopK(**FOUR, k=2),
    "top-k, groups": sparing.TopK(**FOUR, k=2, groups=2, groups_kept=1),
    "top-k, zero experts": sparing.TopK(**FOUR, k=2, null_experts=2),
    "top-k, copy experts": sparing.TopK(**FOUR, k=2, null_experts=2, null_kind="copy"),
    "top-k, constant experts": sparing.TopK(**FOUR, k=2, null_experts=2, null_kind="constant"),
    "top-k, shared experts": sparing.TopK(**FOUR, k=1, shared=1),
    "top-k, residual block": sparing.TopK(**FOUR, k=1, residual=True, residual_coefficient=True),
    "noisy top-k": sparing.NoisyTopK(**FOUR, k=2),
    "switch": sparing.Switch(**FOUR, jitter=0.1),
    "sigmoid top-k": sparing.SigmoidTopK(**FOUR, k=2, rate=0.1),
    "sigmoid top-k, groups": sparing.SigmoidTopK(**FOUR, k=2, groups=2, groups_kept=1),
    "top-p": sparing.TopP(**FOUR, p=0.6),
    "top-p, target": sparing.TopP(**FOUR, target_k=2),
    "top-p, zero experts": sparing.TopP(**FOUR, target_k=2, null_experts=2, normalize=True),
    "relu": sparing.ReLURouter(**FOUR),
    "relu, calibrated": sparing.ReLURouter(**FOUR, start="calibrated", normalize=True),
    "expert choice": sparing.ExpertChoice(**FOUR, k=1.5),
    "random": sparing.RandomExperts(**FOUR, k=1.5),
    "hash": sparing.HashExperts(**FOUR, k=2),
    "top-any": sparing.TopAny(max_experts=SLOTS, target_k=2),
    "top-any, by loss": sparing.TopAny(max_experts=SLOTS, target_k=2, control="loss"),
    "top-any, output means": sparing.TopAny(max_experts=SLOTS, closed_gates="mean"),
    "top-any, published": sparing.TopAny(max_experts=SLOTS, published=True),
}
SAME_K = {
    name
    for name, method in METHODS.items()
    if method.name in ("top-k", "noisy-top-k", "switch", "sigmoid-top-k", "hash")
    and not getattr(method.options, "null_experts", 0)
}
every = pytest.mark.parametrize("name", METHODS)
first = pytest.mark.parametrize("name", [name for name in METHODS if "," not in name])
"""Each router once; its variants are left to the slow tests."""


def build(name: str, *, calibrated: bool = True, **nets: Any) -> ExpertLayer:
    method = METHODS[name]
    options, generator = method.options, torch.Generator().manual_seed(0)
    experts = Experts(DIM, WIDTH, SLOTS, **nets)
    beside = [Experts(DIM, WIDTH, 1) if on else None for on in (options.shared, options.residual)]
    for net in (experts, *beside):
        if net is not None:
            net.init_(generator=generator)
    always = None
    if any(beside):
        learned = options.residual_coefficient
        always = AlwaysOn(DIM, shared=beside[0], residual=beside[1], learned=learned)
    layer = ExpertLayer(method.router(DIM, 0), experts, always=always)
    if calibrated:
        for seed in range(4):
            routing = layer.router(tokens(seed, 64))
            layer.router.update_thresholds(routing.counts, torch.tensor(64))
    return layer


def tokens(seed: int, count: int = TOKENS) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def counted(module: Any, backend: str, **options: Any) -> tuple[Any, Any]:
    """The module compiled whole, and what counts its compilations."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, backend=counter, fullgraph=True, **options), counter


def step(call: Any, layer: ExpertLayer, *inputs: Tensor) -> list[Tensor]:
    """Outputs, auxiliary losses, and all gradients of one training step of some micro-batches."""
    layer.zero_grad()
    tokens = [x.clone().requires_grad_() for x in inputs]
    outputs = [call(x) for x in tokens]
    losses = layer.take_losses()
    (sum(y.float().square().sum() for y in outputs) + sum(losses.values())).backward()
    grads = [x.grad for x in (*tokens, *layer.parameters()) if x.grad is not None]
    return [*(y.detach() for y in outputs), *(v.detach() for v in losses.values()), *grads]


def advance_(layers: list[ExpertLayer]) -> None:
    """What an optimizer and a controller do after a step, alike for all: as the first says."""
    grads = [None if p.grad is None else p.grad.clone() for p in layers[0].parameters()]
    for layer in layers:
        with torch.no_grad():
            for parameter, grad in zip(layer.parameters(), grads, strict=True):
                if grad is not None:
                    parameter -= 0.01 * grad
        record = layer.record
        layer.router.update_thresholds(record.load, record.tokens)
        record.clear()


def seen(layer: ExpertLayer) -> list[Tensor]:
    """All that the layer keeps of training passes."""
    kept = [v for m in (layer.record, layer.router) for v in vars(m).values()]
    tensors = [v for v in kept if isinstance(v, Tensor)]
    return [v.clone() for v in (*tensors, *layer.buffers(), *layer.router.parameters())]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def decodes(name: str, backend: str) -> None:
    layer = build(name).eval()
    call, counter = counted(layer, backend, dynamic=False)
    before, sizes = seen(layer), set()
    with torch.no_grad():
        for seed in range(12):
            x = tokens(seed, 1)
            sizes.add(layer.router(x).rows)
            same([call(x)], [layer(x)])
    assert counter.frame_count == 1
    assert (len(sizes) == 1) == (name in SAME_K)
    same(seen(layer), before, 0.0)  # nothing is drawn, moved or counted


def trains(name: str, backend: str, **nets: Any) -> None:
    layer = build(name, calibrated=False, **nets)
    twin = copy.deepcopy(layer)
    call, counter = counted(twin, backend)
    for seed in range(6):  # thresholds are calibrated in the first four
        x = tokens(seed)
        same(step(call, twin, x), step(layer, layer, x))
        same(seen(twin), seen(layer))
        advance_([layer, twin])
        if seed == 2:  # an expert goes: no shape may depend on it
            layer.router.active[1] = twin.router.active[1] = False
    assert int(layer.record.costs[2]) == 6 * TOKENS
    assert counter.frame_count == 1


def test_every_method_that_routes_is_compiled() -> None:
    routed = [r.name for r in registry.methods() if issubclass(r.load(), RoutedExperts)]
    assert set(routed) == {method.name for method in METHODS.values()}


@first
def test_decoding_is_one_graph_whatever_the_routing(name: str) -> None:
    decodes(name, "eager")


@first
def test_training_is_one_graph_whatever_the_routing(name: str) -> None:
    trains(name, "aot_eager")


def test_experts_without_gates_train_in_a_graph() -> None:
    trains("top-any", "aot_eager", gated=False, bias=True, activation="gelu")


@pytest.mark.slow
@every
def test_generated_code_decodes_alike(name: str) -> None:
    decodes(name, "inductor")


@pytest.mark.slow
@every
def test_generated_code_trains_alike(name: str) -> None:
    trains(name, "inductor")


@pytest.mark.slow
@every
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_padding_and_domains_in_a_graph(name: str, backend: str) -> None:
    layer = build(name, calibrated=False)
    twin = copy.deepcopy(layer)
    call, counter = counted(twin, backend)
    for seed, length in enumerate((9, 12, 3)):
        for one in (layer, twin):
            one.begin(torch.arange(TOKENS).view(2, -1) % 12 < length)
            one.domain, one.domains = torch.tensor([1, 0]), 2
        x = tokens(seed).view(2, -1, DIM)
        same(step(call, twin, x), step(layer, layer, x))
        same(seen(twin), seen(layer))
    assert int(layer.record.costs[2]) == 2 * (9 + 12 + 3)
    assert counter.frame_count == 2  # the first pass makes the sums by domain


@pytest.mark.slow
@every
def test_another_number_of_tokens_computes_alike(name: str) -> None:
    layer = build(name)
    twin = copy.deepcopy(layer)
    call, counter = counted(twin, "aot_eager")
    for count in (24, 31, 17, 56):
        same(step(call, twin, tokens(0, count)), step(layer, layer, tokens(0, count)))
        same(seen(twin), seen(layer))
    assert counter.frame_count <= 4  # once for a number of tokens, at most


@pytest.mark.slow
def test_losses_wait_for_as_many_passes_as_there_are() -> None:
    layer = build("top-any")
    twin = copy.deepcopy(layer)
    call, counter = counted(twin, "aot_eager")
    many = [tokens(seed) for seed in range(12)]
    same(step(call, twin, *many), step(layer, layer, *many), 1e-4)
    for _ in range(40):  # a loop that never takes them
        twin.begin()
        call(tokens(0).requires_grad_()).sum().backward()
    assert counter.frame_count == 1
    assert len(twin.pending) == 16


def rounds(call: Any, layer: ExpertLayer) -> list[Tensor]:
    found = []
    for seed in range(3):
        found += step(call, layer, tokens(seed)) + seen(layer)
    return found


@pytest.mark.slow
@every
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_checkpoint_around_a_compiled_layer_counts_once(name: str, backend: str) -> None:
    layer = build(name, calibrated=False)
    twin = copy.deepcopy(layer)
    call, counter = counted(twin, backend)
    found = rounds(lambda x: checkpoint(call, x, use_reentrant=False), twin)
    same(found, rounds(layer, layer))
    assert counter.frame_count == 1


@pytest.mark.slow
@every
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_checkpoint_counts_once(name: str, backend: str) -> None:
    layer = build(name, calibrated=False)
    twin = copy.deepcopy(layer)
    from torch._dynamo import config

    with config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        call, counter = counted(lambda x: checkpoint(twin, x, use_reentrant=False), backend)
        same(rounds(call, twin), rounds(layer, layer))
    assert counter.frame_count == 1


@pytest.mark.slow
@every
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_in_a_graph(name: str, autocast: bool) -> None:
    layer = build(name, calibrated=False)
    if not autocast:
        for part in (layer.experts, layer.always):
            if part is not None:
                part.bfloat16()
    twin = copy.deepcopy(layer)
    call, counter = counted(twin, "aot_eager")
    for seed in range(3):
        x = tokens(seed) if autocast else tokens(seed).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            same(step(call, twin, x), step(layer, layer, x), 2e-2)
        same(seen(twin), seen(layer), 2e-2)
    # the first pass of bfloat16 tokens gives the record's inputs their dtype
    assert counter.frame_count == (1 if autocast else 2)
