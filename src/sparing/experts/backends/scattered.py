"""Triton kernels that gather tokens, multiply by expert, and scatter weighted outputs to tokens.

The idea is ScatterMoE's (Tan et al. 2024, arXiv 2403.08245): no copy of the tokens in the order of
the experts, and no padding. Here a token takes any number of experts: what is scattered lies token
after token, as many rows as each has, and is summed in that order, so that results repeat exactly.

The kernels are tested in Triton's interpreter on a processor. They have never run on a GPU: their
block sizes are guesses, and their speed is unknown.
"""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts.backends import stages
from sparing.experts.backends.activations import ACTIVATIONS
from sparing.experts.backends.parts import Forward, Nets, Rows, like

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter, which works on any device, stands in for the compiler."""

WIDENED = INTERPRETED
"""Whether bfloat16 is multiplied in single precision: the interpreter's product knows no other."""

ROWS, WIDTH, INNER = 32, 64, 32
"""Block sizes: rows, columns of the result, and terms of the sum at a time."""


@triton.jit
def _product_kernel(
    x,
    weight,
    bias,
    scale,
    out,
    kept,
    source,
    place,
    block_expert,
    block_start,
    ends,
    n,
    inner,
    x_stride,
    expert_stride,
    n_stride,
    inner_stride,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    KEEP: tl.constexpr,
    BIASED: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
):
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return  # there are as many blocks as there can be, not as there are
    row = tl.load(block_start + block) + tl.arange(0, ROWS)
    real = row < tl.load(ends + expert)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < n
    taken = tl.load(source + row, mask=real, other=0) if GATHER else row
    left = x + taken[:, None].to(tl.int64) * x_stride
    right = weight + expert.to(tl.int64) * expert_stride + column[None, :].to(tl.int64) * n_stride
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for first in range(0, inner, INNER):
        term = first + tl.arange(0, INNER)
        a = tl.load(left + term[None, :], mask=real[:, None] & (term < inner)[None, :], other=0.0)
        b = tl.load(
            right + term[:, None].to(tl.int64) * inner_stride,
            mask=(term < inner)[:, None] & inside[None, :],
            other=0.0,
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + expert * n + column, mask=inside, other=0.0)[None, :].to(tl.float32)
    both = real[:, None] & inside[None, :]
    if KEEP:
        spot = kept + row[:, None].to(tl.int64) * n + column[None, :]
        tl.store(spot, total.to(kept.dtype.element_ty), mask=both)
    if SCATTER:
        total *= tl.load(scale + row, mask=real, other=0.0)[:, None].to(tl.float32)
        row = tl.load(place + row, mask=real, other=0)
    spot = out + row[:, None].to(tl.int64) * n + column[None, :]
    tl.store(spot, total.to(out.dtype.element_ty), mask=both)


@triton.jit
def _sum_kernel(z, y, bounds, n, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < n
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for row in range(tl.load(bounds + token), tl.load(bounds + token + 1)):
        total += tl.load(z + row * n + column, mask=inside, other=0.0)
    tl.store(y + token * n + column, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _outer_kernel(
    left,
    right,
    out,
    ends,
    m,
    n,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    expert = tl.program_id(0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    upper = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
    for first in range(start, end, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        a = tl.load(
            left + row[None, :] * m + upper[:, None],
            mask=(row < end)[None, :] & (upper < m)[:, None],
            other=0.0,
        )
        b = tl.load(
            right + row[:, None] * n + column[None, :],
            mask=(row < end)[:, None] & (column < n)[None, :],
            other=0.0,
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    spot = out + expert.to(tl.int64) * m * n + upper[:, None].to(tl.int64) * n + column[None, :]
    both = (upper < m)[:, None] & (column < n)[None, :]
    tl.store(spot, total.to(out.dtype.element_ty), mask=both)


@final
class _Scattered:
    """Rows cut into blocks of one expert each, without asking the device how many there are."""

    def __init__(self, rows: Rows) -> None:
        counts, self.total = rows.counts, rows.tokens.shape[0]
        if rows.weights.dtype == torch.float64:
            raise RequestError('scattered products have no double precision; use backend="loop"')
        self.ends = counts.cumsum(0)
        blocks = -(-counts // ROWS)
        last = blocks.cumsum(0)
        self.blocks = -(-self.total // ROWS) + min(counts.shape[0], self.total)
        block = torch.arange(self.blocks, device=counts.device)
        expert = torch.searchsorted(last, block, right=True)
        within = expert.clamp_max(counts.shape[0] - 1)
        self.start = (self.ends - counts)[within] + (block - (last - blocks)[within]) * ROWS
        self.expert = torch.where(block < last[-1], within, -1)

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        source: Tensor | None = None,
        bias: Tensor | None = None,
        place: Tensor | None = None,
        scale: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Each row times its expert's weight (E, n, inner), transposed: (R, n).

        ``source``: (R,), the rows of x to take; ``place`` and ``scale``: (R,), where results go
        and what they are multiplied by, then in single precision. With ``keep`` also the results
        as they are, in the order of the rows.
        """
        if x.dtype == torch.float64:
            raise RequestError('scattered products have no double precision; use backend="loop"')
        x = x.contiguous()
        _slots, n, inner = weight.shape
        dtype = x.dtype if place is None else torch.float32
        out = torch.empty(self.total, n, dtype=dtype, device=x.device)
        kept = like(x, keep, self.total, n)
        grid = (self.blocks, triton.cdiv(n, WIDTH))
        _launch(
            _product_kernel,
            grid,
            x,
            weight,
            weight if bias is None else bias.contiguous(),
            x if scale is None else scale,
            out,
            kept,
            self.start if source is None else source,
            self.start if place is None else place,
            self.expert,
            self.start,
            self.ends,
            n,
            inner,
            x.stride(0),
            *weight.stride(),
            GATHER=source is not None,
            SCATTER=place is not None,
            KEEP=keep,
            BIASED=bias is not None,
            WIDEN=WIDENED and x.dtype == torch.bfloat16,
            ROWS=ROWS,
            WIDTH=WIDTH,
            INNER=INNER,
        )
        return out, kept

    def onto(self, rows: Tensor, weight: Tensor) -> Tensor:
        return self.product(rows, weight)[0]

    def back(self, rows: Tensor, weight: Tensor) -> Tensor:
        return self.product(rows, weight.transpose(1, 2))[0]

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        (m, n), slots = (left.shape[1], right.shape[1]), self.ends.shape[0]
        out = left.new_empty(slots, m, n)
        grid = (slots, triton.cdiv(m, WIDTH), triton.cdiv(n, WIDTH))
        operands = (left.contiguous(), right.contiguous(), out, self.ends, m, n)
        widen = WIDENED and left.dtype == torch.bfloat16
        _launch(_outer_kernel, grid, *operands, WIDEN=widen, ROWS=ROWS, WIDTH=WIDTH)
        return out


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    if all(grid):
        kernel[grid](*arguments, **settings)


def forward(x: Tensor, rows: Rows, nets: Nets, *, save: bool, means: bool) -> Forward:
    """Compute y (T, o) and what the backward pass needs; see ``Forward``."""
    total, tokens = rows.tokens.shape[0], x.shape[0]
    if not total:
        return stages.forward(_Scattered, x, rows, nets, save=save, means=means)
    act, products = ACTIVATIONS[nets.activation], _Scattered(rows)
    bounds = torch.zeros(tokens + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(rows.k, 0, out=bounds[1:])
    order = rows.tokens.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(total, device=x.device)

    b, _ = products.product(x, nets.up, source=rows.tokens, bias=nets.up_bias)
    if nets.gate is None:
        a, b = b, like(x, False)
        h = act.into(a, torch.empty_like(a))
    else:
        a, _ = products.product(x, nets.gate, source=rows.tokens)
        h = act.into(a, torch.empty_like(a)).mul_(b)
    z, out = products.product(
        h, nets.down, bias=nets.down_bias, place=place, scale=rows.weights, keep=save or means
    )
    y = x.new_empty(tokens, z.shape[1])
    grid = (tokens, triton.cdiv(z.shape[1], WIDTH))
    _launch(_sum_kernel, grid, z, y, bounds, z.shape[1], WIDTH=WIDTH)
    sums = stages.by_expert(out, rows.counts) if means else like(x, False).float()
    if not save:
        a, b, out = (like(x, False) for _ in range(3))
    return Forward(y, a, b, out, sums)


backward = partial(stages.backward, _Scattered)
