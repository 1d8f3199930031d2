"""Gathered weights: each row brings a copy of its expert's weights. For decoding a few tokens.

No number of rows by expert is read back from the device in the forward pass.
"""

from __future__ import annotations

from functools import partial
from typing import final

import torch
from torch import Tensor

from sparing.experts.backends import stages
from sparing.experts.backends.parts import Rows


@final
class _Gathered:
    def __init__(self, rows: Rows) -> None:
        self.counts = rows.counts
        self.experts = torch.repeat_interleave(rows.counts, output_size=rows.tokens.shape[0])

    def onto(self, rows: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(weight[self.experts], rows.unsqueeze(2)).squeeze(2)

    def back(self, rows: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(rows.unsqueeze(1), weight[self.experts]).squeeze(1)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        product = left.new_zeros(self.counts.shape[0], left.shape[1], right.shape[1])
        start = 0
        for expert, count in enumerate(self.counts.tolist()):
            if count:
                rows = slice(start, start + count)
                torch.mm(left[rows].t(), right[rows], out=product[expert])
            start += count
        return product


forward = partial(stages.forward, _Gathered)
backward = partial(stages.backward, _Gathered)
