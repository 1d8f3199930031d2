"""A few rows on a processor: every active expert's weights are read once, where they lie.

For decoding. With a handful of rows the time is that of reading weights from memory, so nothing is
copied: each product takes a view of the stacked parameter. Only outputs are computed this way; a
pass that will be differentiated, or that wants the experts' mean outputs, is the loop's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.experts.backends import loop
from sparing.experts.backends.activations import ACTIVATIONS
from sparing.experts.backends.parts import Forward, Nets, Rows, like

BLOCKS = (96, 64, 48)
"""Weight rows multiplied at a time: a block stays in the second cache while it is packed."""

EXACT = (torch.float32, torch.float64)
"""Dtypes in which the experts' outputs may be summed as they are."""

PLAIN_ROWS = 3
"""Up to this many rows the library's own product reads weights as fast as memory gives them."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, i) times weight (m, i), transposed, plus bias (m,): (n, m).

    From 4 rows on the library would first repack the whole matrix, out of the cache; multiplied
    in blocks of its rows, in one call, it is up to 1.6 times as fast (16 rows: as fast).
    """
    block = 0
    if x.shape[0] > PLAIN_ROWS and x.dtype == torch.float32:
        block = next((b for b in BLOCKS if weight.shape[0] % b == 0), 0)
    if not block:
        return F.linear(x, weight, bias)
    rows, (width, inputs) = x.shape[0], weight.shape
    pieces = width // block
    out = x.new_empty(rows, width)
    torch.bmm(
        x.expand(pieces, rows, inputs),
        weight.view(pieces, block, inputs).transpose(1, 2),
        out=out.view(rows, pieces, block).transpose(0, 1),
    )
    return out if bias is None else out.add_(bias)


def forward(x: Tensor, rows: Rows, nets: Nets, *, save: bool, means: bool) -> Forward:
    """Compute y (T, o); see ``Forward``."""
    if save or means:
        return loop.forward(x, rows, nets, save=save, means=means)
    if x.shape[0] == 1 and x.dtype in EXACT:
        picked = [expert for expert, count in enumerate(rows.counts.tolist()) if count]
        y = one_token(x, picked, rows.weights.tolist(), nets)
    else:
        y = _few_tokens(x, rows, nets)
    # four empty tensors and not one of them four times, which an operator must not return
    a, b, out = (like(x, False) for _ in range(3))
    return Forward(y, a, b, out, like(x, False, dtype=torch.float32))


def one_token(x: Tensor, picked: list[int], weights: list[float], nets: Nets) -> Tensor:
    """x (1, d) through the experts picked, times their weights, summed: (1, o).

    Every matrix that is read drives code and small tensors out of the cache, and the next call
    pays for it: so what can be done before is, and as few calls as can be lie between.
    """
    act = ACTIVATIONS[nets.activation]
    only = x[0]
    y = only.new_zeros(nets.down.shape[1])
    hidden = only.new_empty(len(picked), nets.up.shape[1])
    downs = [nets.down[expert] for expert in picked]
    _vectors(hidden, nets.up, nets.up_bias, picked, only)
    if nets.gate is None:
        act.into(hidden, hidden)
    else:
        gates = torch.empty_like(hidden)
        _vectors(gates, nets.gate, None, picked, only)
        hidden.mul_(act.into(gates, gates))
    for down, h, weight in zip(downs, hidden.unbind(), weights, strict=True):
        y.addmv_(down, h, alpha=weight)
    if nets.down_bias is not None:
        for expert, weight in zip(picked, weights, strict=True):
            y.add_(nets.down_bias[expert], alpha=weight)
    return y.unsqueeze(0)


def _vectors(
    out: Tensor, stacked: Tensor, bias: Tensor | None, picked: list[int], x: Tensor
) -> None:
    """out (k, m): the products of x (i,) and the matrices (m, i) of the experts picked."""
    matrices = [stacked[expert] for expert in picked]
    if bias is None:
        for matrix, place in zip(matrices, out.unbind(), strict=True):
            torch.mv(matrix, x, out=place)
    else:
        biases = [bias[expert] for expert in picked]
        for matrix, one, place in zip(matrices, biases, out.unbind(), strict=True):
            torch.addmv(one, matrix, x, out=place)


def _few_tokens(x: Tensor, rows: Rows, nets: Nets) -> Tensor:
    act = ACTIVATIONS[nets.activation]
    start, outputs = 0, []
    taken = x.index_select(0, rows.tokens)
    for expert, count in enumerate(rows.counts.tolist()):
        if not count:
            continue
        xs = taken[start : start + count]
        start += count
        up_bias = None if nets.up_bias is None else nets.up_bias[expert]
        down_bias = None if nets.down_bias is None else nets.down_bias[expert]
        h = product(xs, nets.up[expert], up_bias)
        if nets.gate is None:
            act.into(h, h)
        else:
            gate = product(xs, nets.gate[expert], None)
            h.mul_(act.into(gate, gate))
        outputs.append(product(h, nets.down[expert], down_bias))
    if not outputs:
        return x.new_zeros(x.shape[0], nets.down.shape[1])
    # sums by token in at least single precision
    out = torch.cat(outputs)
    wide = out if out.dtype == torch.float64 else out.float()
    y = wide.new_zeros(x.shape[0], wide.shape[1])
    weighted = wide * rows.weights.to(wide.dtype).unsqueeze(1)
    return y.index_add_(0, rows.tokens, weighted).to(x.dtype)


backward = loop.backward
