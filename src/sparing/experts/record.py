"""What a layer has seen since the last optimizer step: sums only, so that ranks can add them."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sparing.experts.routing import Routing

RECENT = 256
"""How many recent token inputs a layer keeps for the controller to look at."""


@final
class Record:
    """Sums over the training tokens since the last ``clear``; all tensors live beside the layer.

    tokens: (), real tokens; load: (E,), rows of each expert; k_counts: (E + 1,), tokens by number
    of experts; unserved: (), tokens that no gate opened for; unserved_sum: (d,), the sum of their
    inputs; fallback: (E,), the rows of those tokens; output_sum: (E, d), sums of experts'
    unweighted outputs; domain_load: (D, E) or None; recent: (<= 256, d), the latest inputs, not
    summed.
    """

    def __init__(self, slots: int, dim: int) -> None:
        self.slots, self.dim = slots, dim
        self.clear()

    def clear(self, device: torch.device | None = None) -> None:
        """Forget everything."""
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.load = torch.zeros(self.slots, dtype=torch.int64, device=device)
        self.k_counts = torch.zeros(self.slots + 1, dtype=torch.int64, device=device)
        self.unserved = torch.zeros((), dtype=torch.int64, device=device)
        self.unserved_sum = torch.zeros(self.dim, device=device)
        self.fallback = torch.zeros(self.slots, dtype=torch.int64, device=device)
        self.output_sum = torch.zeros(self.slots, self.dim, device=device)
        self.domain_load: Tensor | None = None
        self.recent = torch.zeros(0, self.dim, device=device)

    @torch.no_grad()
    def add(
        self,
        x: Tensor,
        routing: Routing,
        *,
        mask: Tensor | None = None,
        output_sum: Tensor | None = None,
        domain: Tensor | None = None,
        domains: int = 0,
    ) -> None:
        """Add one forward pass; x: (T, d), mask: (T,), output_sum: (E, d), domain: (T,) int64."""
        if self.load.device != x.device:
            self.clear(x.device)
        k = routing.k if mask is None else routing.k[mask]
        self.tokens += k.shape[0]
        self.load += routing.counts
        self.k_counts += torch.bincount(k, minlength=self.slots + 1)
        if routing.unserved is not None:
            self.unserved += routing.unserved.sum()
            self.unserved_sum += routing.unserved.to(x.dtype) @ x
            forced = routing.experts[routing.unserved[routing.tokens]]
            self.fallback += torch.bincount(forced, minlength=self.slots)
        if output_sum is not None:
            self.output_sum += output_sum
        if domain is not None:
            if self.domain_load is None:
                self.domain_load = torch.zeros(
                    domains, self.slots, dtype=torch.int64, device=x.device
                )
            pair = domain[routing.tokens] * self.slots + routing.experts
            self.domain_load += torch.bincount(pair, minlength=domains * self.slots).view(
                domains, self.slots
            )
        real = x if mask is None else x[mask]
        stride = max(1, real.shape[0] // RECENT)
        self.recent = real[::stride][:RECENT].detach().clone()
