"""A loop over the experts that have rows: every expert's elementwise work stays in the cache.

The fastest on a processor, and the only fast backend in double precision. Rows are gathered,
multiplied and activated one expert (and at most ``CHUNK`` rows) at a time in buffers that all
experts share, and every result goes straight to its place in a tensor allocated once.

Half precision on a processor without matrix units for it is storage only: each expert's weights
and rows are widened as their turn comes, and the arithmetic is in single precision, which is both
faster there and more exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, final

import torch
from torch import Tensor

from sparing.experts.backends.activations import ACTIVATIONS
from sparing.experts.backends.parts import Forward, Grads, Needs, Nets, Rows, combine, like

CHUNK = 1024
"""Rows that are computed at a time, at most: it bounds the buffers."""

CHUNK_WIDENED = 384
"""The same where rows are widened, whose buffers are twice as large as what is stored."""


class _Piece(NamedTuple):
    expert: int
    start: int
    stop: int
    first: bool
    last: bool


def _pieces(counts: list[int], chunk: int) -> Iterator[_Piece]:
    start = 0
    for expert, count in enumerate(counts):
        end, parts = start + count, -(-count // chunk)
        for part in range(parts):
            # parts of one size: no short rest, whose products would be slow
            stop = end - count * (parts - 1 - part) // parts
            yield _Piece(expert, start, stop, part == 0, part == parts - 1)
            start = stop


@cache
def arithmetic(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for a dtype to store in."""
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    matrix_units = dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16", False)
    return dtype if matrix_units else torch.float32


@final
class _Desk:
    """Buffers by name, each allocated once and used by all pieces, in the dtype of arithmetic."""

    def __init__(self, x: Tensor, counts: list[int]) -> None:
        self.dtype, self.device = arithmetic(x.device.type, x.dtype), x.device
        self.chunk = CHUNK if self.dtype == x.dtype else CHUNK_WIDENED
        self.size = min(self.chunk, max(counts, default=0))
        self.kept: dict[str, Tensor] = {}

    def rows(self, name: str, n: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """An (n, width) buffer, contents undefined."""
        if name not in self.kept:
            self.kept[name] = torch.empty(
                self.size, width, dtype=dtype or self.dtype, device=self.device
            )
        return self.kept[name][:n]

    def lift(self, name: str, tensor: Tensor) -> Tensor:
        """The matrix in the dtype of arithmetic: itself, or a copy in a buffer."""
        return tensor if tensor.dtype == self.dtype else self.place(name, tensor).copy_(tensor)

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """Where to compute the matrix: itself, or a buffer that ``_put`` stores."""
        if tensor.dtype == self.dtype:
            return tensor
        if name not in self.kept:
            most = max(self.size, tensor.shape[0])
            self.kept[name] = torch.empty(
                most, tensor.shape[1], dtype=self.dtype, device=self.device
            )
        return self.kept[name][: tensor.shape[0]]

    def take(self, name: str, source: Tensor, index: Tensor) -> Tensor:
        """The rows of ``source`` at ``index``, in the dtype of arithmetic."""
        own = self.rows(f"{name}, stored", index.shape[0], source.shape[1], source.dtype)
        return self.lift(name, torch.index_select(source, 0, index, out=own))


def _put(tensor: Tensor, computed: Tensor) -> None:
    """Store what was computed in ``place``."""
    if computed.dtype != tensor.dtype:
        tensor.copy_(computed)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


def _unbind(stacked: Tensor | None) -> list[Tensor]:
    return [] if stacked is None else list(stacked.unbind())


def forward(x: Tensor, rows: Rows, nets: Nets, *, save: bool, means: bool) -> Forward:
    """Compute y (T, o) and what the backward pass needs; see ``Forward``."""
    act = ACTIVATIONS[nets.activation]
    (slots, width, _dim), out_dim, total = nets.up.shape, nets.down.shape[1], rows.tokens.shape[0]
    counts = rows.counts.tolist()
    desk = _Desk(x, counts)
    gates, ups, downs = _unbind(nets.gate), _unbind(nets.up), _unbind(nets.down)
    gated = nets.gate is not None

    a_all, b_all = like(x, save, total, width), like(x, save and gated, total, width)
    out = like(x, True, total, out_dim, dtype=desk.dtype)
    sums = torch.zeros((slots, out_dim) if means else (0,), dtype=torch.float32, device=x.device)
    for expert, start, stop, first, _last in _pieces(counts, desk.chunk):
        if first:
            up, down = desk.lift("up", ups[expert]), desk.lift("down", downs[expert])
            gate = desk.lift("gate", gates[expert]) if gated else None
            up_bias = None if nets.up_bias is None else nets.up_bias[expert]
            down_bias = None if nets.down_bias is None else nets.down_bias[expert]
        n, here = stop - start, slice(start, stop)
        xs = desk.take("x", x, rows.tokens[here])
        h = desk.rows("h", n, width)
        a = desk.place("a", a_all[here]) if save else desk.rows("a", n, width)
        if gate is None:
            _affine(xs, up, up_bias, a)
            act.into(a, h)
        else:
            b = desk.place("b", b_all[here]) if save else desk.rows("b", n, width)
            torch.mm(xs, gate.t(), out=a)
            _affine(xs, up, up_bias, b)
            act.into(a, h)
            h.mul_(b)
            if save:
                _put(b_all[here], b)
        if save:
            _put(a_all[here], a)
        _affine(h, down, down_bias, out[here])
        if means:
            sums[expert] += out[here].sum(0)
    y = combine(out, rows.tokens, rows.k, rows.weights).to(x.dtype)
    return Forward(y, a_all, b_all, out.to(x.dtype) if save else like(x, False), sums)


def backward(
    grad: Tensor, x: Tensor, rows: Rows, nets: Nets, saved: Forward, needs: Needs
) -> Grads:
    """Gradients from grad (T, o); hidden activations are computed again from what was saved."""
    act = ACTIVATIONS[nets.activation]
    (_slots, width, dim), out_dim, total = nets.up.shape, nets.down.shape[1], rows.tokens.shape[0]
    counts = rows.counts.tolist()
    desk = _Desk(x, counts)
    gates, ups, downs = _unbind(nets.gate), _unbind(nets.up), _unbind(nets.down)

    gx = like(x, needs.x, total, dim, dtype=desk.dtype)
    gw = like(rows.weights, needs.weights, total)
    places = _places(nets, counts, needs.nets)
    weights = rows.weights.to(desk.dtype).unsqueeze(1)
    for expert, start, stop, first, last in _pieces(counts, desk.chunk):
        if first:
            up, down = desk.lift("up", ups[expert]), desk.lift("down", downs[expert])
            gate = desk.lift("gate", gates[expert]) if gates else None
        n, here = stop - start, slice(start, stop)
        token = rows.tokens[here]
        gy = desk.take("gy", grad, token)
        if needs.weights:
            product = torch.mul(
                gy, desk.lift("out", saved.rows[here]), out=desk.rows("product", n, out_dim)
            )
            gw[here] = product.sum(1)
        gy.mul_(weights[here])
        ga = torch.mm(gy, down, out=desk.rows("ga", n, width))
        a = desk.lift("a", saved.a[here])
        h = act.into(a, desk.rows("h", n, width))
        if gate is None:
            gb = act.back_(ga, a)
        else:
            b = desk.lift("b", saved.b[here])
            gb = torch.mul(ga, h, out=desk.rows("gb", n, width))
            h.mul_(b)
            act.back_(ga.mul_(b), a)
        if needs.nets:
            xs = desk.take("x", x, token)
            pairs = {"down": (gy, h), "up": (gb, xs)} | ({"gate": (ga, xs)} if gates else {})
            for name, (left, right) in pairs.items():
                place = places[name][expert]
                product = desk.place(f"{name} gradient", place)
                if first:
                    torch.mm(left.t(), right, out=product)
                else:
                    torch.addmm(product, left.t(), right, out=product)
                if last:
                    _put(place, product)
            if nets.up_bias is not None:
                places["up_bias"][expert] += gb.sum(0)
            if nets.down_bias is not None:
                places["down_bias"][expert] += gy.sum(0)
        if needs.x:
            torch.mm(gb, up, out=gx[here])
            if gate is not None:
                torch.addmm(gx[here], ga, gate, out=gx[here])
    if needs.x:
        gx = combine(gx, rows.tokens, rows.k, None).to(x.dtype)
    return Grads(gx, gw, **places)


def _places(nets: Nets, counts: list[int], wanted: bool) -> dict[str, Tensor]:
    """Where the gradients of the nets go: zero where nothing will be written over it."""
    places = {}
    for name in ("gate", "up", "up_bias", "down", "down_bias"):
        net: Tensor | None = getattr(nets, name)
        if net is None or not wanted:
            places[name] = like(nets.up, False)
        elif name.endswith("bias"):
            places[name] = torch.zeros_like(net)
        else:
            places[name] = torch.empty_like(net)
            for expert, count in enumerate(counts):
                if not count:
                    places[name][expert].zero_()
    return places
