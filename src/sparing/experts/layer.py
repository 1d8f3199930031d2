"""The expert layer that stands where a feed-forward block stood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.core.recompute import recomputing
from sparing.experts import one_token
from sparing.experts.always import AlwaysOn
from sparing.experts.experts import Experts
from sparing.experts.gates import credit_closed_gates
from sparing.experts.pending import Pending
from sparing.experts.record import Record
from sparing.experts.router import Router


@final
class ExpertLayer(nn.Module):
    """A router and its experts; hidden (..., d) in, the same shape out.

    ``always``: shared experts and a residual block that act on every token beside the routed ones.

    In training it keeps a ``record`` of what was routed (see Record) and the router's auxiliary
    losses of the forward passes since ``take_losses``. Evaluation passes and the recomputation of
    activation checkpointing (use the non-reentrant kind) leave both as they are.

    ``mask``: (B, S) bool, set by the host or by the model's forward hook, False for padding: such
    tokens get no rows, their output is 0, and no statistic sees them. ``domain``: (B,) int64,
    or (B, S) where rows hold samples of several.
    """

    owns_flops = True
    output_mean: Tensor

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        name: str = "",
        dropout: float = 0.0,
        always: AlwaysOn | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.name = router, experts, name
        self.always = always
        self.dropout = nn.Dropout(dropout)
        self.mask: Tensor | None = None
        self.domain: Tensor | None = None
        self.domains = 0
        self.record = Record(router.slots_count, router.dim)
        self.pending = Pending()
        if router.tracks_outputs:
            self.register_buffer("output_mean", torch.zeros(router.slots_count, router.dim))

    def __getstate__(self) -> dict[str, Any]:
        # losses hold a graph, and masks belong to a batch: neither can or should be copied
        return {**self.__dict__, "pending": Pending(), "mask": None, "domain": None}

    def extra_repr(self) -> str:
        return f"name={self.name!r}, active={int(self.router.active.sum())}"

    def begin(self, mask: Tensor | None = None) -> None:
        """A forward pass of the model begins: take its mask.

        Losses of training passes wait for ``take_losses``; of a loop that never takes them only
        the latest few are kept, so that their graphs do not pile up.
        """
        self.mask = mask
        if self.training:
            self.pending.begin()

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.numel() == hidden.shape[-1] and not (
            self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):
            decoded = self._decode(hidden)
            if decoded is not None:
                return decoded
        x = hidden.reshape(-1, hidden.shape[-1])
        mask = self._token_mask(hidden)
        routing = self.router(x, mask)
        tracks = self.training and self.router.tracks_outputs
        output_sum: Tensor | None = None
        if tracks:
            y, output_sum = self.experts(x, routing, want_means=True)
        else:
            y = self.experts(x, routing)
        if routing.closed is not None:
            y = credit_closed_gates(y, routing.closed, self.output_mean)
        if routing.bypass is not None:
            y = y + routing.bypass.to(y.dtype)
        if self.always is not None:
            y = self.always(x, y, mask)
        if self.training and not recomputing():
            added = self.record.add(
                x,
                routing,
                self.router.active,
                mask=mask,
                output_sum=output_sum,
                domain=self._token_domain(hidden),
                domains=self.domains,
            )
            if routing.losses:
                self.pending.add(routing.losses, added)
        y = y.view(hidden.shape)
        dropped: Tensor = self.dropout(y) if self.training else y
        return dropped

    def _decode(self, hidden: Tensor) -> Tensor | None:
        """One real token in evaluation, the short way; None where there is none."""
        mask = self._token_mask(hidden)
        if mask is not None and not bool(mask):
            return None
        y = one_token.output(self.router, self.experts, hidden)
        if y is not None and self.always is not None:
            y = self.always(hidden.reshape(1, -1), y, mask)
        return None if y is None else y.view(hidden.shape)

    def _token_mask(self, hidden: Tensor) -> Tensor | None:
        """The mask of this forward, (T,); with a cache hidden states are the mask's last tokens."""
        if self.mask is None or hidden.ndim != 3:
            return None
        batch, length = hidden.shape[:2]
        if self.mask.shape[0] != batch or self.mask.shape[1] < length:
            raise RequestError(
                f"the padding mask is {tuple(self.mask.shape)} but the hidden states are "
                f"{tuple(hidden.shape)}; it must cover the batch and at least its length"
            )
        return self.mask[:, -length:].reshape(-1).to(hidden.device)

    def _token_domain(self, hidden: Tensor) -> Tensor | None:
        if self.domain is None or hidden.ndim != 3 or self.domain.shape[0] != hidden.shape[0]:
            return None
        domain = self.domain.to(hidden.device)
        if domain.ndim == 2:
            return domain.reshape(-1) if domain.shape == hidden.shape[:2] else None
        return domain.repeat_interleave(hidden.shape[1])

    def take_losses(self) -> dict[str, Tensor]:
        """The auxiliary losses by name, summed over the forwards since the last call."""
        total: dict[str, Tensor] = {}
        for losses in self.pending.take():
            for name, value in losses.items():
                total[name] = total[name] + value if name in total else value
        return total

    def take_flops(self) -> tuple[int, int]:
        """(spent, dense) of training since the last call, forward and backward.

        Spent is what the routed rows cost; dense is every active expert on every real token. A
        product costs 2 m n k; backward costs the same again for inputs, and for trained weights.
        """
        trained = any(p.requires_grad for p in self.experts.parameters())
        passes = 3 if trained else 2
        rows_spent, rows_dense, tokens_spent = self.record.costs.tolist()
        spent = passes * self.experts.flops(rows_spent) + self.router.flops(tokens_spent)
        dense = passes * self.experts.flops(rows_dense)
        if self.always is not None:
            # what every token passes belongs to either side
            trained = any(p.requires_grad for p in self.always.parameters())
            both = (3 if trained else 2) * self.always.flops(tokens_spent)
            spent, dense = spent + both, dense + both
        self.record.costs.zero_()
        return spent, dense


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """The model's expert layers, in the order of its modules."""
    return list(_layers(model))


def _layers(model: nn.Module) -> Iterator[ExpertLayer]:
    for module in model.modules():
        if isinstance(module, ExpertLayer):
            yield module


def router_loss(model: nn.Module) -> Tensor:
    """The sum of the auxiliary losses of all expert layers since the last call, a scalar.

    For plain loops: ``loss = task_loss + sparing.router_loss(model)``. Already weighted.
    """
    layers = expert_layers(model)
    if not layers:
        raise RequestError("this model has no expert layers; call sparing.moefy_(model, ...) first")
    values = [value for layer in layers for value in layer.take_losses().values()]
    if values:
        return torch.stack(values).sum()
    return torch.zeros((), device=layers[0].router.similarity.device)
