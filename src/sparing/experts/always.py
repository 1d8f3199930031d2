"""What acts on every token beside the routed experts: shared experts, and the dense block itself.

Shared experts: DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066). The dense block beside the
experts: residual MoE in DeepSpeed-MoE (Rajbhandari et al. 2022, arXiv 2201.05596); the learned
coefficient is that of DeepSpeed's layer, without its bias.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.experts.backends.dense import outputs
from sparing.experts.experts import Experts
from sparing.experts.router import exact


@final
class AlwaysOn(nn.Module):
    """The shared experts and the residual block of one layer, either or both.

    shared: several experts of one width whose outputs are summed are one expert of all their
    hidden units, and are computed as that; it has one slot. residual: the dense block, one slot.
    coefficient: (2, d), the logits by which each token weighs the experts against the residual
    block (zero at first: half and half), or None: both count fully.
    """

    coefficient: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        shared: Experts | None = None,
        residual: Experts | None = None,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.shared, self.residual = dim, shared, residual
        weighs = residual is not None and learned
        self.coefficient = nn.Parameter(torch.zeros(2, dim)) if weighs else None

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The layer's output from x and the experts' output y, all (T, d); mask: (T,) bool.

        Padding, where y is 0, stays 0 and costs nothing.
        """
        if mask is None:
            return self._add(x, y)
        real = mask.nonzero().squeeze(1)
        return y.index_copy(0, real, self._add(x[real], y[real]))

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        if self.shared is not None:
            y = y + outputs(x, self.shared.nets(), 0).to(y.dtype)
        if self.residual is None:
            return y
        kept = outputs(x, self.residual.nets(), 0).to(y.dtype)
        if self.coefficient is None:
            return y + kept
        with torch.autocast(x.device.type, enabled=False):
            share = F.linear(exact(x), exact(self.coefficient)).softmax(1).to(y.dtype)
        return y * share[:, :1] + kept * share[:, 1:]

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over that many tokens: two per product."""
        nets = [net for net in (self.shared, self.residual) if net is not None]
        weighing = 0 if self.coefficient is None else 2 * tokens * 2 * self.dim
        return sum(net.flops(tokens) for net in nets) + weighing

    def describe(self) -> str:
        """In words, for ``sparing plan``."""
        parts = []
        if self.shared is not None:
            parts.append(f"shared experts of {self.shared.width} hidden units")
        if self.residual is not None:
            parts.append(f"the dense block of {self.residual.width}")
        return " and ".join(parts)
