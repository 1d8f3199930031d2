"""The reference: every expert computes every token, in plain differentiable operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.experts.backends.activations import ACTIVATIONS
from sparing.experts.backends.parts import Nets


def outputs(x: Tensor, nets: Nets, expert: int) -> Tensor:
    """What one expert makes of all tokens: (T, d) to (T, o)."""
    act = ACTIVATIONS[nets.activation].plain
    up_bias = None if nets.up_bias is None else nets.up_bias[expert]
    down_bias = None if nets.down_bias is None else nets.down_bias[expert]
    up = F.linear(x, nets.up[expert], up_bias)
    hidden = act(up) if nets.gate is None else act(F.linear(x, nets.gate[expert])) * up
    return F.linear(hidden, nets.down[expert], down_bias)


def dense(
    x: Tensor, tokens: Tensor, experts: Tensor, weights: Tensor, nets: Nets
) -> tuple[Tensor, Tensor]:
    """y (T, o) and the sums (E, o) of the outputs of the chosen tokens, detached.

    T x E expert evaluations: for tests, double precision and second derivatives, not for speed.
    """
    slots = nets.up.shape[0]
    share = weights.new_zeros(x.shape[0], slots).index_put((tokens, experts), weights)
    chosen = torch.zeros_like(share).index_put((tokens, experts), torch.ones_like(weights))
    y = x.new_zeros(x.shape[0], nets.down.shape[1])
    sums = []
    for expert in range(slots):
        out = outputs(x, nets, expert)
        y = y + out * share[:, expert, None].to(out.dtype)
        sums.append((out.detach().float() * chosen[:, expert, None].float()).sum(0))
    return y, torch.stack(sums)
