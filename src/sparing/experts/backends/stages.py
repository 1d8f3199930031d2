"""Forward and backward over all rows at once, given three products over segments of rows.

The grouped, padded and gathered backends differ only in how they multiply each expert's segment
with its weights; this is the rest of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sparing.experts.backends.activations import ACTIVATIONS
from sparing.experts.backends.parts import Forward, Grads, Needs, Nets, Rows, combine, like


class Products(Protocol):
    """Matrix products of each expert's segment of rows with its weights."""

    def onto(self, rows: Tensor, weight: Tensor) -> Tensor:
        """(R, n) rows and (E, m, n) weights to (R, m): each row times its expert's transpose."""

    def back(self, rows: Tensor, weight: Tensor) -> Tensor:
        """(R, m) rows and (E, m, n) weights to (R, n): each row times its expert's weight."""

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """(R, m) and (R, n) rows to (E, m, n): the sum of outer products of each segment."""


def by_expert(rows: Tensor, counts: Tensor) -> Tensor:
    """Sums (E, n), at least in single precision, of each expert's segment of rows (R, n)."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    bounds = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(counts, 0, out=bounds[1:])
    order = torch.arange(rows.shape[0], device=rows.device)
    return torch.embedding_bag(wide, order, bounds, mode=0, include_last_offset=True)[0]


def forward(
    make: Callable[[Rows], Products], x: Tensor, rows: Rows, nets: Nets, *, save: bool, means: bool
) -> Forward:
    """Compute y (T, o) and what the backward pass needs; see ``Forward``."""
    act = ACTIVATIONS[nets.activation]
    slots, out_dim = nets.down.shape[:2]
    if not rows.tokens.shape[0]:
        y = x.new_zeros(x.shape[0], out_dim)
        width = nets.up.shape[1]
        a, b = like(x, save, 0, width), like(x, save and nets.gate is not None, 0, width)
        zeros = torch.zeros((slots, out_dim) if means else (0,), device=x.device)
        return Forward(y, a, b, like(x, save, 0, out_dim), zeros)
    products = make(rows)
    expert = torch.repeat_interleave(rows.counts, output_size=rows.tokens.shape[0])
    xs = x.index_select(0, rows.tokens)
    b = products.onto(xs, nets.up)
    if nets.up_bias is not None:
        b += nets.up_bias.index_select(0, expert)
    if nets.gate is None:
        a, b = b, like(x, False)
        h = act.into(a, torch.empty_like(a))
    else:
        a = products.onto(xs, nets.gate)
        h = act.into(a, torch.empty_like(a)).mul_(b)
    out = products.onto(h, nets.down)
    if nets.down_bias is not None:
        out += nets.down_bias.index_select(0, expert)
    y = combine(out, rows.tokens, rows.k, rows.weights).to(x.dtype)
    no_sums = like(x, False, dtype=torch.float32)
    sums = by_expert(out, rows.counts).float() if means else no_sums
    if not save:
        a, b, out = (like(x, False) for _ in range(3))
    return Forward(y, a, b, out, sums)


def backward(
    make: Callable[[Rows], Products],
    grad: Tensor,
    x: Tensor,
    rows: Rows,
    nets: Nets,
    saved: Forward,
    needs: Needs,
) -> Grads:
    """Gradients from grad (T, o), of any strides."""
    act = ACTIVATIONS[nets.activation]
    gated, none = nets.gate is not None, like(x, False)
    if not rows.tokens.shape[0]:
        nothing = [
            torch.zeros_like(net) if needs.nets and net is not None else like(x, False)
            for net in (nets.gate, nets.up, nets.up_bias, nets.down, nets.down_bias)
        ]
        gx = torch.zeros_like(x) if needs.x else like(x, False)
        return Grads(gx, torch.zeros_like(rows.weights), *nothing)
    products = make(rows)
    gy = grad.index_select(0, rows.tokens)
    gw = like(rows.weights, False)
    if needs.weights:
        gw = (gy * saved.rows).sum(1, dtype=rows.weights.dtype)
    gy *= rows.weights.to(gy.dtype).unsqueeze(1)
    gh = products.back(gy, nets.down)
    h = act.into(saved.a, torch.empty_like(saved.a))
    if gated:
        gb = gh * h
        h *= saved.b
        gh *= saved.b
    act.back_(gh, saved.a)
    up_grad = gb if gated else gh
    gx = none
    if needs.x:
        gx = products.back(up_grad, nets.up)
        if nets.gate is not None:
            gx += products.back(gh, nets.gate)
        gx = combine(gx, rows.tokens, rows.k, None).to(x.dtype)
    if not needs.nets:
        return Grads(gx, gw, *(like(x, False) for _ in range(5)))
    xs = x.index_select(0, rows.tokens)
    up_bias, down_bias = like(x, False), like(x, False)
    if nets.up_bias is not None:
        up_bias = by_expert(up_grad, rows.counts).to(x.dtype)
    if nets.down_bias is not None:
        down_bias = by_expert(gy, rows.counts).to(x.dtype)
    return Grads(
        x=gx,
        weights=gw,
        gate=products.outer(gh, xs) if gated else like(x, False),
        up=products.outer(up_grad, xs),
        up_bias=up_bias,
        down=products.outer(gy, h),
        down_bias=down_bias,
    )
