"""Decoding one token: its routing in plain numbers, and its experts' weights read where they lie.

The time of a single token is that of reading its experts' weights. They drive code and small
tensors out of the cache, so that each further operation costs many times what it does when warm:
some forty small ones of a general routing took a quarter of the whole. Here a router asks torch
for the products of the token and its rows only, and does the rest on a handful of plain numbers.
Where rounding could decide (a tie, or nearly), or a number is not finite, the general way decides.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparing.experts.backends import streamed

if TYPE_CHECKING:
    from sparing.experts.experts import Experts
    from sparing.experts.router import Router

CLEAR = 1e-4
"""Closer logits than this, times the largest, are left to the general way, which rounds them."""

DEEPEST = 80.0
"""How far below the best a score may lie before its exponential is no normal float32 number."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def output(router: Router, experts: Experts, hidden: Tensor) -> Tensor | None:
    """The routed experts' output (1, o) of the only token in hidden; None: go the general way.

    In evaluation without gradient, on a processor. The same numbers as the general way gives, but
    for the rounding of the routing weights.
    """
    if (
        not hidden.is_cpu
        or hidden.dtype not in DTYPES
        or type(hidden) is not Tensor  # one that only stands for a tensor has no numbers
        or torch.is_autocast_enabled("cpu")
        # someone watches the calls of these modules, which must then be made
        or router._forward_hooks
        or experts._forward_hooks
        or router._forward_pre_hooks
        or experts._forward_pre_hooks
    ):
        return None
    nets = experts.nets()
    if nets.up.dtype != hidden.dtype or nets.up.shape[2] != hidden.shape[-1]:
        return None
    x = hidden.reshape(-1)
    found = router.one(x)
    return None if found is None else streamed.one_token(x.view(1, -1), *found, nets)


def best(logits: list[float], live: list[bool], k: int) -> list[int] | None:
    """The k best live slots (all, if there are fewer), best first; None if rounding may decide."""
    total = sum(logits)
    if total - total != 0:
        return None
    ranked = sorted(zip(logits, range(len(logits)), strict=True), reverse=True)
    if not all(live):
        ranked = [pair for pair in ranked if live[pair[1]]]
        if not ranked:
            return None
    top, last = ranked[0][0], ranked[-1][0]
    if k < len(ranked):
        last = ranked[k - 1][0]
        if last - ranked[k][0] < CLEAR * max(1.0, abs(top), abs(ranked[-1][0])):
            return None
    return None if top - last > DEEPEST else [e for _value, e in ranked[:k]]


def softmax(logits: list[float], among: list[int]) -> list[float]:
    """The probabilities of these slots among one another."""
    top = max(logits[e] for e in among)
    shares = [math.exp(logits[e] - top) for e in among]
    total = sum(shares)
    return [share / total for share in shares]
