"""AdamW for one group of an optimizer whose other groups follow other rules; their shared parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sparing.core.checks import require_number


def require_options(group: Mapping[str, Any], *names: str) -> None:
    """RequestError unless the named options are at least 0 and each of ``betas`` from 0 to 1."""
    for name in names:
        require_number(name, group[name], 0)
    for beta in group["betas"]:
        require_number("each of betas", beta, 0, 1)


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """What an optimizer's step is told of the loss, with gradients on; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def adamw_(group: dict[str, Any], state: MutableMapping[Tensor, Any]) -> None:
    """Update the group's parameters that have a dense gradient, by torch's own function.

    ``group`` has ``params``, ``lr``, ``betas``, ``eps`` and ``weight_decay``, decoupled; ``state``
    is the optimizer's. Loshchilov and Hutter 2019, algorithm 2.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    for p in params:
        if not state[p]:
            state[p]["step"] = torch.zeros(())
            state[p]["exp_avg"] = torch.zeros_like(p)
            state[p]["exp_avg_sq"] = torch.zeros_like(p)
    adamw(
        params,
        [p.grad for p in params],
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        foreach=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
