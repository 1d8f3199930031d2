"""What a layer has seen since the last optimizer step: sums only, so that ranks can add them."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sparing.core.recompute import recomputing
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
    summed. costs: (3,) int64, rows, rows if every active expert took every token, and tokens since
    they were last set to 0: the ledger's, which ``clear`` leaves.
    """

    def __init__(self, slots: int, dim: int) -> None:
        self.slots, self.dim = slots, dim
        self.costs = torch.zeros(3, dtype=torch.int64)
        self.latest = torch.zeros(RECENT, dim)
        self.clear()

    def clear(self, device: torch.device | None = None) -> None:
        """Forget everything but the costs."""
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.load = torch.zeros(self.slots, dtype=torch.int64, device=device)
        self.k_counts = torch.zeros(self.slots + 1, dtype=torch.int64, device=device)
        self.unserved = torch.zeros((), dtype=torch.int64, device=device)
        self.unserved_sum = torch.zeros(self.dim, device=device)
        self.fallback = torch.zeros(self.slots, dtype=torch.int64, device=device)
        self.output_sum = torch.zeros(self.slots, self.dim, device=device)
        self.domain_load: Tensor | None = None
        self.kept = torch.zeros((), dtype=torch.int64)

    @property
    def recent(self) -> Tensor:
        """The latest inputs, (<= 256, d)."""
        return self.latest[: int(self.kept)]

    @torch.no_grad()
    def add(
        self,
        x: Tensor,
        routing: Routing,
        active: Tensor,
        *,
        mask: Tensor | None = None,
        output_sum: Tensor | None = None,
        domain: Tensor | None = None,
        domains: int = 0,
    ) -> Tensor | None:
        """Add one forward pass; x: (T, d), mask: (T,), output_sum: (E, d), domain: (T,) int64.

        Returns None, or of a pass that is compiled a () bool on the CPU: whether it was added. A
        graph cannot tell a first pass from a checkpoint's recomputation before it runs.
        """
        if self.load.device != x.device:
            self.clear(x.device)
        if domain is not None and self.domain_load is None:
            self.domain_load = torch.zeros(domains, self.slots, dtype=torch.int64, device=x.device)
        if self.latest.dtype != x.dtype or self.latest.device != x.device:
            self.latest = torch.zeros(RECENT, self.dim, dtype=x.dtype, device=x.device)
        arguments = (
            x.detach(),
            routing.tokens,
            routing.experts,
            routing.counts,
            routing.k,
            active,
            routing.unserved,
            mask,
            output_sum,
            domain,
            self.costs,
            self.tokens,
            self.load,
            self.k_counts,
            self.unserved,
            self.unserved_sum,
            self.fallback,
            self.output_sum,
            self.domain_load if domain is not None else None,
            self.latest,
            self.kept,
        )
        if torch.compiler.is_compiling():
            added: Tensor = _operator(*arguments)
            return added
        _add(*arguments)
        return None


def _add(
    x: Tensor,
    row_tokens: Tensor,
    row_experts: Tensor,
    counts: Tensor,
    k: Tensor,
    active: Tensor,
    no_gate: Tensor | None,
    mask: Tensor | None,
    outputs: Tensor | None,
    domain: Tensor | None,
    costs: Tensor,
    tokens: Tensor,
    load: Tensor,
    k_counts: Tensor,
    unserved: Tensor,
    unserved_sum: Tensor,
    fallback: Tensor,
    output_sum: Tensor,
    domain_load: Tensor | None,
    latest: Tensor,
    kept: Tensor,
) -> None:
    real = x if mask is None else x[mask]
    k = k if mask is None else k[mask]
    slots, total = counts.shape[0], k.shape[0]
    costs += torch.tensor([row_tokens.shape[0], total * int(active.sum()), total])
    tokens += total
    load += counts
    k_counts += torch.bincount(k, minlength=slots + 1)
    if no_gate is not None:
        unserved += no_gate.sum()
        unserved_sum += no_gate.to(x.dtype) @ x
        forced = row_experts[no_gate[row_tokens]]
        fallback += torch.bincount(forced, minlength=slots)
    if outputs is not None:
        output_sum += outputs
    if domain is not None and domain_load is not None:
        pair = domain[row_tokens] * slots + row_experts
        domain_load += torch.bincount(pair, minlength=domain_load.numel()).view_as(domain_load)
    few = real[:: max(1, total // RECENT)][:RECENT]
    latest[: few.shape[0]] = few
    kept.fill_(few.shape[0])


SUMS = (
    "costs",
    "tokens",
    "load",
    "k_counts",
    "unserved",
    "unserved_sum",
    "fallback",
    "output_sum",
    "domain_load",
    "latest",
    "kept",
)


@torch.library.custom_op("sparing::record", mutates_args=SUMS)
def _operator(
    x: Tensor,
    row_tokens: Tensor,
    row_experts: Tensor,
    counts: Tensor,
    k: Tensor,
    active: Tensor,
    no_gate: Tensor | None,
    mask: Tensor | None,
    outputs: Tensor | None,
    domain: Tensor | None,
    costs: Tensor,
    tokens: Tensor,
    load: Tensor,
    k_counts: Tensor,
    unserved: Tensor,
    unserved_sum: Tensor,
    fallback: Tensor,
    output_sum: Tensor,
    domain_load: Tensor | None,
    latest: Tensor,
    kept: Tensor,
) -> Tensor:
    first = not recomputing()
    if first:
        rows = (x, row_tokens, row_experts, counts, k, active, no_gate, mask, outputs, domain)
        sums = (costs, tokens, load, k_counts, unserved, unserved_sum, fallback, output_sum)
        _add(*rows, *sums, domain_load, latest, kept)
    return torch.tensor(first)


@_operator.register_fake
def _(x: Tensor, *_arguments: Tensor | None) -> Tensor:
    return torch.empty((), dtype=torch.bool)
