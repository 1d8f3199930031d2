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
    act = ACTIVATIONS[nets.activation]
    single, start, outputs = x.shape[0] == 1, 0, []
    taken = x if single else x.index_select(0, rows.tokens)
    for expert, count in enumerate(rows.counts.tolist()):
        if not count:
            continue
        xs = x if single else taken[start : start + count]
        start += count
        up_bias = None if nets.up_bias is None else nets.up_bias[expert]
        down_bias = None if nets.down_bias is None else nets.down_bias[expert]
        b = product(xs, nets.up[expert], up_bias)
        if nets.gate is None:
            h = act.into(b, b)
        else:
            a = product(xs, nets.gate[expert], None)
            h = act.into(a, a).mul_(b)
        outputs.append(product(h, nets.down[expert], down_bias))
    none = like(x, False)
    return Forward(_combine(x, rows, nets, outputs), none, none, none, none.float())


def _combine(x: Tensor, rows: Rows, nets: Nets, outputs: list[Tensor]) -> Tensor:
    """Sum the rows' outputs, times their weights, by token, in at least single precision."""
    if not outputs:
        return x.new_zeros(x.shape[0], nets.down.shape[1])
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if out.dtype in (torch.bfloat16, torch.float16):
        out = out.float()
    weights = rows.weights.to(out.dtype)
    if x.shape[0] == 1:
        return torch.mm(weights.unsqueeze(0), out).to(x.dtype)
    y = out.new_zeros(x.shape[0], out.shape[1])
    return y.index_add_(0, rows.tokens, out.mul_(weights.unsqueeze(1))).to(x.dtype)


backward = loop.backward
