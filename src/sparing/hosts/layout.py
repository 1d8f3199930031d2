"""How an optimizer's state lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def lay_out_like_parameters_(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the strides of its parameter: files keep none, fused kernels need them.

    With channels last in memory a fused step would pair the momentum of one weight with another.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
