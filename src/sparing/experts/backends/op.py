"""All backends behind one call: in eager mode one autograd function, in a graph one operator.

The operator is opaque to the compiler, so that the loops over experts and the number of rows,
known only when the numbers are, neither break nor specialise a graph. Eager mode goes without it:
its first call would import the compiler (seconds), and each call costs about 0.15 ms more.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparing.core.errors import RequestError
from sparing.experts.backends import gathered, grouped, loop, padded, streamed
from sparing.experts.backends.choice import choose_backend
from sparing.experts.backends.parts import Forward, Grads, Needs, Nets, Rows


class Backend(Protocol):
    """A module with the two passes of a layer."""

    def forward(self, x: Tensor, rows: Rows, nets: Nets, *, save: bool, means: bool) -> Forward:
        """Outputs, and with ``save`` what the backward pass needs."""

    def backward(
        self, grad: Tensor, x: Tensor, rows: Rows, nets: Nets, saved: Forward, needs: Needs
    ) -> Grads:
        """Gradients from the gradient of the output."""


@final
class _Scattered:
    """The Triton backend, imported when it is first used: triton is large, and often absent."""

    def forward(self, x: Tensor, rows: Rows, nets: Nets, *, save: bool, means: bool) -> Forward:
        return _kernels(x).forward(x, rows, nets, save=save, means=means)

    def backward(
        self, grad: Tensor, x: Tensor, rows: Rows, nets: Nets, saved: Forward, needs: Needs
    ) -> Grads:
        return _kernels(x).backward(grad, x, rows, nets, saved, needs)


def _kernels(x: Tensor) -> Backend:
    try:
        module = importlib.import_module("sparing.experts.backends.scattered")
    except ModuleNotFoundError as error:
        raise RequestError(
            'backend="scattered" needs triton: pip install triton, or leave backend at "auto"'
        ) from error
    if x.device.type == "cpu" and not module.INTERPRETED:
        raise RequestError(
            'backend="scattered" runs on a GPU, or with TRITON_INTERPRET=1 set before Python '
            'starts; the tokens are on the CPU: leave backend at "auto"'
        )
    return cast(Backend, module)


BACKENDS = cast(
    "dict[str, Backend]",
    {
        "loop": loop,
        "grouped": grouped,
        "padded": padded,
        "gathered": gathered,
        "streamed": streamed,
        "scattered": _Scattered(),
    },
)

INPUTS = 14
"""Arguments of a forward pass: 10 tensors (x, 4 of the rows, 5 of the nets) and 4 settings."""

FIRST_NET, LAST_NET = 5, 10


def apply(
    x: Tensor, rows: Rows, nets: Nets, *, backend: str, save: bool, means: bool
) -> tuple[Tensor, Tensor]:
    """y (T, o), differentiable once, and with ``means`` the sums (E, o), else (0,)."""
    compiling = torch.compiler.is_compiling()
    if not (save or compiling):
        found = _run(x, rows, nets, backend, save, means)
        return found.y, found.sums
    call: Any = _operator if compiling else _Function.apply
    outputs = call(
        x,
        rows.tokens,
        rows.weights,
        rows.counts,
        rows.k,
        nets.gate,
        nets.up,
        nets.up_bias,
        nets.down,
        nets.down_bias,
        nets.activation,
        backend,
        save,
        means,
    )
    return outputs[0], outputs[-1]


def _chosen(backend: str, x: Tensor, rows: Rows, nets: Nets, grad: bool) -> Backend:
    """The backend of that name; "auto": by the load, known when the numbers are."""
    if backend == "auto":
        size = x.dtype.itemsize
        widths = (x.shape[1], *nets.down.shape[1:])
        backend = choose_backend(
            device=x.device.type,
            dtype=x.dtype,
            rows=rows.tokens.shape[0],
            experts=nets.up.shape[0],
            aligned=all(width * size % 16 == 0 for width in widths),
            grad=grad,
        )
    return BACKENDS[backend]


def _run(x: Tensor, rows: Rows, nets: Nets, backend: str, save: bool, means: bool) -> Forward:
    forward = _chosen(backend, x, rows, nets, save or means).forward
    if not torch.is_autocast_enabled(x.device.type):  # the context costs more than asking
        return forward(x, rows, nets, save=save, means=means)
    # the inputs are already in the dtype of the computation
    with torch.autocast(x.device.type, enabled=False):
        return forward(x, rows, nets, save=save, means=means)


def _forward(arguments: Sequence[Any]) -> Forward:
    x, tokens, weights, counts, k, *nets, activation, backend, save, means = arguments
    rows = Rows(tokens=tokens, weights=weights, counts=counts, k=k)
    return _run(x, rows, _nets(nets, activation), backend, save, means)


def _backward(grad: Tensor, arguments: Sequence[Any], needs: Needs) -> Grads:
    x, tokens, weights, counts, k, *nets, a, b, out, activation, backend = arguments
    with torch.autocast(x.device.type, enabled=False):
        rows = Rows(tokens=tokens, weights=weights, counts=counts, k=k)
        saved = Forward(y=grad, a=a, b=b, rows=out, sums=grad)
        stacked = _nets(nets, activation)
        chosen = _chosen(backend, x, rows, stacked, True)
        return chosen.backward(grad, x, rows, stacked, saved, needs)


def _nets(tensors: Sequence[Any], activation: str) -> Nets:
    gate, up, up_bias, down, down_bias = tensors
    return Nets(
        gate=gate, up=up, up_bias=up_bias, down=down, down_bias=down_bias, activation=activation
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.backend, save, _means = inputs
    _y, a, b, out, sums = output
    ctx.mark_non_differentiable(a, b, out, sums)
    ctx.set_materialize_grads(False)
    if save:
        ctx.save_for_backward(*tensors, a, b, out)


def _needs(ctx: Any) -> Needs:
    needed = ctx.needs_input_grad
    return Needs(x=needed[0], weights=needed[2], nets=any(needed[FIRST_NET:LAST_NET]))


def _gradients(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """One gradient for each argument; None where none is needed."""
    places: list[Tensor | None] = [None] * INPUTS
    for place, grad in zip((0, 2, *range(FIRST_NET, LAST_NET)), grads, strict=True):
        if ctx.needs_input_grad[place]:
            places[place] = grad
    return tuple(places)


@final
class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        outputs = tuple(_forward(arguments))
        _setup(ctx, arguments, outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * INPUTS
        arguments = (*ctx.saved_tensors, ctx.activation, ctx.backend)
        return _gradients(ctx, _backward(grads[0], arguments, _needs(ctx)))


@torch.library.custom_op("sparing::experts", mutates_args=())
def _operator(
    x: Tensor,
    tokens: Tensor,
    weights: Tensor,
    counts: Tensor,
    k: Tensor,
    gate: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    backend: str,
    save: bool,
    means: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    nets = (gate, up, up_bias, down, down_bias)
    return _forward((x, tokens, weights, counts, k, *nets, activation, backend, save, means))


@_operator.register_fake
def _(
    x: Tensor,
    tokens: Tensor,
    weights: Tensor,
    counts: Tensor,
    k: Tensor,
    gate: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    backend: str,
    save: bool,
    means: bool,
) -> tuple[Tensor, ...]:
    total, (slots, width, _dim), out = tokens.shape[0], up.shape, down.shape[1]
    return (
        x.new_empty(x.shape[0], out),
        x.new_empty((total, width) if save else (0,)),
        x.new_empty((total, width) if save and gate is not None else (0,)),
        x.new_empty((total, out) if save else (0,)),
        x.new_empty((slots, out) if means else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("sparing::experts_backward", mutates_args=())
def _operator_backward(
    grad: Tensor,
    x: Tensor,
    tokens: Tensor,
    weights: Tensor,
    counts: Tensor,
    k: Tensor,
    gate: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    activation: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    nets = (gate, up, up_bias, down, down_bias)
    arguments = (x, tokens, weights, counts, k, *nets, a, b, out, activation, backend)
    return _backward(grad, arguments, Needs(*needs))


@_operator_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    tokens: Tensor,
    weights: Tensor,
    counts: Tensor,
    k: Tensor,
    gate: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    activation: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    def shaped(wanted: bool, like: Tensor | None) -> Tensor:
        if not wanted or like is None:
            return x.new_empty(0)
        return like.new_empty(like.shape)

    return (
        shaped(needs[0], x),
        shaped(needs[1], weights),
        *(shaped(needs[2], net) for net in (gate, up, up_bias, down, down_bias)),
    )


def _operator_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * INPUTS
    needs = _needs(ctx)
    found = _operator_backward(
        grads[0], *ctx.saved_tensors, ctx.activation, ctx.backend, list(needs)
    )
    return _gradients(ctx, found)


_operator.register_autograd(_operator_gradients, setup_context=_setup)


def infer(x: Tensor, chosen: Tensor, shares: Tensor, nets: Nets, *, backend: str) -> Tensor:
    """y (T, o) without gradient, inside of a graph; chosen: (T, E) bool, shares: (T, E).

    One operator of fixed shapes: neither the graph nor its guards know how many rows there are.
    """
    found: Tensor = torch.ops.sparing.infer(
        x,
        chosen,
        shares,
        nets.gate,
        nets.up,
        nets.up_bias,
        nets.down,
        nets.down_bias,
        nets.activation,
        backend,
    )
    return found


def _infer(x: Tensor, chosen: Tensor, shares: Tensor, *arguments: Any) -> Tensor:
    *tensors, activation, backend = arguments
    nets = _nets(tensors, activation)
    alone = x.shape[0] == 1 and x.device.type == "cpu" and x.dtype != torch.float64
    if alone and backend in ("auto", "streamed"):
        weights = shares.tolist()[0]
        picked = [e for e, taken in enumerate(chosen.tolist()[0]) if taken]
        return streamed.one_token(x, picked, [weights[e] for e in picked], nets)
    by_expert = chosen.t().contiguous()
    rows = Rows(
        tokens=by_expert.nonzero()[:, 1],
        weights=torch.masked_select(shares.t(), by_expert),
        counts=by_expert.sum(1),
        k=chosen.sum(1),
    )
    return _run(x, rows, nets, backend, save=False, means=False).y


_library: Any = cast(Any, torch.library).Library("sparing", "FRAGMENT")
# not a custom_op: its checks at each call cost as much as reading half an expert
_library.define(
    "infer(Tensor x, Tensor chosen, Tensor shares, Tensor? gate, Tensor up, Tensor? up_bias, "
    "Tensor down, Tensor? down_bias, str activation, str backend) -> Tensor"
)
_library.impl("infer", _infer, "CompositeExplicitAutograd")


def _infer_shape(x: Tensor, chosen: Tensor, shares: Tensor, *arguments: Any) -> Tensor:
    down: Tensor = arguments[3]
    return x.new_empty(x.shape[0], down.shape[1])


torch.library.register_fake("sparing::infer", _infer_shape, lib=_library)
