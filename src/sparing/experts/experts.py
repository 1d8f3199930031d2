"""Stacked feed-forward experts: each token is computed by the experts that its routing names."""

from __future__ import annotations

import math
from typing import Literal, final, overload

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError, unknown
from sparing.experts.backends import traced
from sparing.experts.backends.activations import ACTIVATIONS
from sparing.experts.backends.dense import dense
from sparing.experts.backends.op import BACKENDS, apply, infer
from sparing.experts.backends.parts import Nets, Rows
from sparing.experts.routing import Routing

CHOICES = ("auto", "dense", *BACKENDS)


@final
class Experts(nn.Module):
    """``slots`` feed-forward nets dim -> width -> out_dim in stacked weights, slot on axis 0.

    gated: down(activation(gate(x)) * up(x)) with ``gate`` (E, f, d), ``up`` (E, f, d) and ``down``
    (E, o, f); plain: down(activation(up(x))). ``bias`` adds ``up_bias`` (E, f) and ``down_bias``
    (E, o). Each slice has the layout of ``nn.Linear``. ``activation``: "silu", "gelu",
    "gelu_tanh" or "relu". ``init_std``: standard deviation of normal weights (biases are zero);
    None draws weights and biases as ``nn.Linear`` does.
    """

    gate: nn.Parameter | None
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        width: int,
        slots: int,
        *,
        gated: bool = True,
        bias: bool = False,
        activation: str = "silu",
        out_dim: int | None = None,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if min(dim, width, slots) < 1:
            raise RequestError(
                f"dim, width and slots must be at least 1, got {dim}, {width} and {slots}"
            )
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        self.dim, self.width, self.count = dim, width, slots
        self.out_dim = dim if out_dim is None else out_dim
        self.activation, self.init_std = activation, init_std
        self.up = nn.Parameter(torch.empty(slots, width, dim))
        self.down = nn.Parameter(torch.empty(slots, self.out_dim, width))
        self.gate = nn.Parameter(torch.empty(slots, width, dim)) if gated else None
        self.up_bias = nn.Parameter(torch.empty(slots, width)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(slots, self.out_dim)) if bias else None
        self.init_()

    @torch.no_grad()
    def init_(self, slot: int | None = None, *, generator: torch.Generator | None = None) -> None:
        """Draw the weights of one slot, or of all, anew.

        Uniform in ±1/sqrt(inputs) as ``nn.Linear``, or normal with ``init_std`` and zero biases.
        """
        for name, parameter in self.slots().items():
            target = parameter if slot is None else parameter[slot]
            if self.init_std is None:
                bound = 1 / math.sqrt(self.width if name.startswith("down") else self.dim)
                target.uniform_(-bound, bound, generator=generator)
            elif name.endswith("bias"):
                target.zero_()
            else:
                target.normal_(0.0, self.init_std, generator=generator)

    def slots(self) -> dict[str, nn.Parameter]:
        """The parameters whose first axis is the slot, by name: here, all of them."""
        return dict(self.named_parameters(recurse=False))

    def nets(self) -> Nets:
        """The weights as the backends take them."""
        return Nets(
            gate=self.gate,
            up=self.up,
            up_bias=self.up_bias,
            down=self.down,
            down_bias=self.down_bias,
            activation=self.activation,
        )

    @overload
    def forward(
        self, x: Tensor, routing: Routing, *, backend: str = ..., want_means: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, routing: Routing, *, backend: str = ..., want_means: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, routing: Routing, *, backend: str = "auto", want_means: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute tokens (T, d) to (T, o): the sum of weight times output over a token's rows.

        A token without rows gets zeros. ``backend``: "auto", "loop", "grouped", "padded",
        "gathered", "streamed", "scattered" or "dense". With ``want_means``, also the sums (E, o)
        of each expert's unweighted outputs over its rows, detached, float32. Differentiable once
        in x, the routing weights and the parameters ("dense": any number of times). Under autocast
        the weights are cast once per call and gradients come back in the parameter's dtype.

        Raises RequestError for an unknown backend and for shapes or dtypes that do not fit.
        """
        self._check(x, routing, backend)
        device = x.device.type
        nets = self.nets()
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x, nets = x.to(dtype), nets.to(dtype)
        elif x.dtype != self.up.dtype:
            raise RequestError(f"tokens are {x.dtype} and the experts' weights {self.up.dtype}")
        grad = torch.is_grad_enabled() and (
            x.requires_grad
            or routing.shares.requires_grad
            or any(parameter.requires_grad for parameter in self.parameters())
        )
        if backend == "dense":
            with torch.autocast(device, enabled=False):
                y, sums = dense(x, routing.tokens, routing.experts, routing.weights, nets)
        else:
            if torch.compiler.is_compiling() and not (grad or want_means):
                return self._in_a_graph(x, routing, nets, backend)
            rows = Rows(
                tokens=routing.tokens, weights=routing.weights, counts=routing.counts, k=routing.k
            )
            y, sums = apply(x, rows, nets, backend=backend, save=grad, means=want_means)
        return (y, sums) if want_means else y

    def _in_a_graph(self, x: Tensor, routing: Routing, nets: Nets, backend: str) -> Tensor:
        """Only the outputs, in a compiled graph."""
        most = routing.most
        alone = x.shape[0] == 1 and x.is_cpu and x.dtype != torch.float64
        if alone and backend == "auto" and most is not None and most <= traced.FEW:
            return traced.one_token(x, routing.chosen, routing.shares, most, nets)
        return infer(x, routing.chosen, routing.shares, nets, backend=backend)

    def reference(self, x: Tensor, routing: Routing) -> Tensor:
        """The same by the dense reference: every expert on every token, plain operations."""
        return self.forward(x, routing, backend="dense")

    def flops(self, rows: int) -> int:
        """Floating-point operations of a forward pass over ``rows`` rows: two per multiply-add.

        The backward pass takes twice as many. Elementwise work is not counted.
        """
        inputs = self.dim * (1 if self.gate is None else 2)
        return 2 * rows * self.width * (inputs + self.out_dim)

    def extra_repr(self) -> str:
        """Sizes and kind, for ``print``."""
        kind = "gated" if self.gate is not None else "plain"
        return (
            f"{self.dim} -> {self.width} -> {self.out_dim}, slots={self.count}, {kind}, "
            f"{self.activation}"
        )

    def _check(self, x: Tensor, routing: Routing, backend: str) -> None:
        if backend not in CHOICES:
            raise unknown("backend", backend, CHOICES)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise RequestError(f"tokens must be (T, {self.dim}), got {tuple(x.shape)}")
        if routing.counts.shape[0] != self.count:
            raise RequestError(
                f"the routing is for {routing.counts.shape[0]} experts, the layer has {self.count}"
            )
        if routing.k.shape[0] != x.shape[0]:
            raise RequestError(f"the routing is for {routing.k.shape[0]} tokens, got {x.shape[0]}")
