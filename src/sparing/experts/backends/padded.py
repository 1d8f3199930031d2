"""Padded batch product: each active expert's rows padded with zeros to those of the fullest.

Good where loads are even; (active experts x largest load) rows are computed.
"""

from __future__ import annotations

from functools import partial
from typing import final

import torch
from torch import Tensor

from sparing.experts.backends import stages
from sparing.experts.backends.parts import Rows


@final
class _Padded:
    def __init__(self, rows: Rows) -> None:
        counts = rows.counts
        self.slots, self.active = counts.shape[0], counts.nonzero().squeeze(1)
        held = counts[self.active]
        self.capacity, total = int(held.max()), rows.tokens.shape[0]
        which = torch.repeat_interleave(held, output_size=total)
        start = held.cumsum(0) - held
        row = torch.arange(total, device=counts.device)
        self.place = which * self.capacity + row - start[which]

    def _spread(self, rows: Tensor) -> Tensor:
        flat = rows.new_zeros(self.active.shape[0] * self.capacity, rows.shape[1])
        flat.index_copy_(0, self.place, rows)
        return flat.view(self.active.shape[0], self.capacity, rows.shape[1])

    def _gather(self, spread: Tensor) -> Tensor:
        return spread.flatten(0, 1).index_select(0, self.place)

    def _used(self, weight: Tensor) -> Tensor:
        everyone = self.active.shape[0] == self.slots
        return weight if everyone else weight.index_select(0, self.active)

    def onto(self, rows: Tensor, weight: Tensor) -> Tensor:
        return self._gather(torch.bmm(self._spread(rows), self._used(weight).transpose(1, 2)))

    def back(self, rows: Tensor, weight: Tensor) -> Tensor:
        return self._gather(torch.bmm(self._spread(rows), self._used(weight)))

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        product = torch.bmm(self._spread(left).transpose(1, 2), self._spread(right))
        if self.active.shape[0] == self.slots:
            return product
        every = product.new_zeros(self.slots, *product.shape[1:])
        return every.index_copy_(0, self.active, product)


forward = partial(stages.forward, _Padded)
backward = partial(stages.backward, _Padded)
