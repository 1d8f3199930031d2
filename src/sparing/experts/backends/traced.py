"""One token inside of a compiled graph, in operations that the compiler turns into its own loops.

Its code reads the weights of the chosen experts once, where they lie, and calls nothing between
the products. The graph must know how many experts there are at most; where routing alone decides
it, the operator ``sparing::infer`` computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.experts.backends.activations import ACTIVATIONS
from sparing.experts.backends.parts import Nets

FEW = 8
"""Experts of a token, of each of which the graph has a copy of the code."""


def one_token(x: Tensor, chosen: Tensor, shares: Tensor, most: int, nets: Nets) -> Tensor:
    """x: (1, d) through its experts, (1, o); chosen: (1, E) bool, shares: (1, E), see Routing.

    most: how many experts the token takes at most; of fewer, the others get no weight.
    """
    act = ACTIVATIONS[nets.activation].plain
    columns = torch.arange(chosen.shape[1], device=chosen.device)
    left = chosen[0]
    y = torch.zeros(1, nets.down.shape[1], device=x.device)
    # one expert after another: a single stream of reading is what memory does best
    for _ in range(min(most, chosen.shape[1])):
        expert = left.float().argmax().view(1)
        there, weight = left.any(), shares[0, expert].float()
        left = left & (columns != expert)
        hidden = _product(nets.up, nets.up_bias, expert, x)
        if nets.gate is None:
            hidden = act(hidden)
        else:
            hidden = act(_product(nets.gate, None, expert, x)) * hidden
        out = _product(nets.down, nets.down_bias, expert, hidden).float() * weight
        y = y + torch.where(there, out, 0.0)
    return y.to(x.dtype)


def _product(stacked: Tensor, bias: Tensor | None, expert: Tensor, x: Tensor) -> Tensor:
    """The expert's weights (m, i) times x: (1, i), plus its bias; expert: (1,); (1, m)."""
    y = torch.bmm(stacked[expert], x[:, :, None])[:, :, 0]
    return y if bias is None else y + bias[expert]
