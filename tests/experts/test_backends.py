"""Every backend against the dense reference: outputs, sums and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparing.experts.backends import choose_backend, loop
from sparing.experts.experts import Experts
from sparing.experts.routing import Routing

FAST = ("loop", "grouped", "padded", "gathered", "streamed")
KINDS: dict[str, dict[str, Any]] = {
    "gated": {"gated": True},
    "gated, biased": {"gated": True, "bias": True, "activation": "relu"},
    "plain": {"gated": False, "bias": True, "activation": "gelu"},
    "plain, tanh": {"gated": False, "activation": "gelu_tanh"},
}


def layer(seed: int, *sizes: int, **kind: Any) -> Experts:
    experts = Experts(*sizes, **kind)
    experts.init_(generator=torch.Generator().manual_seed(seed))
    return experts


def passes(
    experts: Experts,
    chosen: Tensor,
    *,
    backend: str,
    seed: int = 0,
    shape_grad: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> list[Tensor]:
    """Output, sums, and gradients of tokens, weights and parameters."""
    generator = torch.Generator().manual_seed(seed)
    dtype = experts.up.dtype
    x = torch.randn(chosen.shape[0], experts.dim, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(chosen.shape, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(chosen.shape[0], experts.out_dim, generator=generator).to(dtype)
    routing = Routing(chosen, weights)
    y, sums = experts(x, routing, backend=backend, want_means=True)
    inputs = [x, weights, *experts.parameters()]
    grads = torch.autograd.grad(y, inputs, shape_grad(grad), allow_unused=True)
    found = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(inputs, grads, strict=True)
    ]
    return [y.detach(), sums, *found]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 24),
    slots=st.integers(1, 6),
    dim=st.sampled_from([4, 5, 12]),
    density=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**16),
)
def test_random_routings_agree_with_the_reference(
    backend: str, tokens: int, slots: int, dim: int, density: float, kind: str, seed: int
) -> None:
    experts = layer(seed, dim, 2 * dim + 1, slots, **KINDS[kind])
    draw = torch.rand(tokens, slots, generator=torch.Generator().manual_seed(seed))
    chosen = draw < density
    same(
        passes(experts, chosen, backend=backend, seed=seed),
        passes(experts, chosen, backend="dense", seed=seed),
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("backend", FAST)
def test_an_expert_without_rows_gets_exactly_zero_gradient(backend: str, kind: str) -> None:
    experts = layer(0, 8, 16, 4, **KINDS[kind])
    chosen = torch.tensor([[True, False, True, False]]).expand(9, 4)
    _y, sums, _x, weights, *nets = passes(experts, chosen, backend=backend)
    assert not sums[[1, 3]].any()
    assert not weights[:, [1, 3]].any()
    for gradient in nets:
        assert not gradient[[1, 3]].any()
        assert gradient[[0, 2]].any()


@pytest.mark.parametrize("backend", FAST)
def test_gradients_of_any_strides(backend: str) -> None:
    experts = layer(1, 8, 16, 3)
    chosen = torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    for shape_grad in (
        lambda grad: grad.new_ones(1, 1).expand_as(grad),
        lambda grad: grad.t().contiguous().t(),
        lambda grad: grad.repeat_interleave(2, dim=1)[:, ::2],
    ):
        same(
            passes(experts, chosen, backend=backend, shape_grad=shape_grad),
            passes(experts, chosen, backend="dense", shape_grad=shape_grad),
        )


def test_an_expert_with_more_rows_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = layer(2, 8, 16, 3, gated=True, bias=True)
    chosen = torch.rand(50, 3, generator=torch.Generator().manual_seed(2)) < 0.7
    expected = passes(experts, chosen, backend="dense")
    monkeypatch.setattr(loop, "CHUNK", 16)
    same(passes(experts, chosen, backend="loop"), expected)


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("backend", FAST)
def test_half_precision_is_near_the_reference(
    backend: str, widened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = torch.float32 if widened else torch.bfloat16
    monkeypatch.setattr(loop, "arithmetic", lambda device, dtype: kept)
    experts = layer(3, 16, 32, 4)
    chosen = torch.rand(40, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    found = passes(experts.bfloat16(), chosen, backend=backend)
    expected = passes(experts.float(), chosen, backend="dense")
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one.float() / scale, other / scale, atol=0.03, rtol=0.0)


def test_arithmetic_widens_only_half_precision() -> None:
    assert loop.arithmetic("cpu", torch.float32) == torch.float32
    assert loop.arithmetic("cpu", torch.float64) == torch.float64
    assert loop.arithmetic("cpu", torch.float16) == torch.float32
    assert loop.arithmetic("cuda", torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"gated, biased"}))
def test_gradcheck_of_the_loop(kind: str) -> None:
    experts = layer(4, 3, 5, 3, **KINDS[kind]).double()
    generator = torch.Generator().manual_seed(4)
    chosen = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]]).bool()
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    names = list(experts.slots())

    def run(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        routing = Routing(chosen, weights)
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(experts, values, (x, routing), {"backend": "loop"})

    assert torch.autograd.gradcheck(run, (x, weights, *experts.parameters()))


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("backend", ["loop", "grouped", "padded"])
def test_no_tensor_of_tokens_by_experts_by_capacity(backend: str) -> None:
    experts = layer(5, 8, 16, 8)
    chosen = torch.rand(128, 8, generator=torch.Generator().manual_seed(5)) < 0.3
    capacity = int(chosen.sum(0).max())
    with _Largest() as seen:
        passes(experts, chosen, backend=backend)
    assert 0 < seen.elements <= max(experts.up.numel(), 8 * capacity * 16)
    assert seen.elements < 128 * 8 * capacity / 4


def test_choice() -> None:
    load: dict[str, Any] = {"experts": 16, "aligned": True, "grad": True}
    single, half = torch.float32, torch.bfloat16
    assert choose_backend(device="cpu", dtype=single, rows=8192, **load) == "loop"
    assert choose_backend(device="cpu", dtype=single, rows=100, **load) == "grouped"
    assert choose_backend(device="cpu", dtype=torch.float64, rows=100, **load) == "loop"
    assert choose_backend(device="cpu", dtype=single, rows=None, **load) == "loop"
    assert choose_backend(device="cuda", dtype=half, rows=8192, **load) == "grouped"
    assert choose_backend(device="cuda", dtype=single, rows=100, **load) == "padded"
    odd = load | {"aligned": False}
    assert choose_backend(device="cpu", dtype=single, rows=100, **odd) == "loop"
    decoding = load | {"grad": False}
    assert choose_backend(device="cuda", dtype=half, rows=2, **decoding) == "gathered"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, on import
@pytest.mark.parametrize("backend", ["auto", "grouped"])
def test_compiles_whole_with_one_recompilation_over_20_sizes(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    experts = layer(6, 16, 32, 4)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(experts, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(6)
    for size in range(20):
        chosen = torch.rand(8 + 5 * size, 4, generator=generator) < 0.5
        x = torch.randn(chosen.shape[0], 16, generator=generator)
        weights = torch.rand(chosen.shape, generator=generator)
        results = []
        for call in (compiled, experts):
            inputs = x.clone().requires_grad_()
            routing = Routing(chosen, weights)
            routing.weights.requires_grad_()
            y = call(inputs, routing, backend=backend)
            tensors = (inputs, routing.weights, *experts.parameters())
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), tensors)])
        same(*results)
    assert 1 <= counter.frame_count <= 2
