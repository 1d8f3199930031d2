"""Grouped matrix product: one call for all experts, wrapped once against its sharp edges.

``torch.nn.functional.grouped_mm`` wants offsets in int32, strides in multiples of 16 bytes (widths
are padded with zeros here), contiguous operands and no double precision; it leaves rows past the
last offset unwritten (here the last offset is always the number of rows).
"""

from __future__ import annotations

from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.experts.backends import stages
from sparing.experts.backends.parts import Rows


def padding(width: int, dtype: torch.dtype) -> int:
    """Elements to add to ``width`` to reach a multiple of 16 bytes."""
    return -width % (16 // dtype.itemsize)


def _padded(tensor: Tensor) -> Tensor:
    extra = padding(tensor.shape[-1], tensor.dtype)
    return F.pad(tensor, (0, extra)) if extra else tensor.contiguous()


@final
class _Grouped:
    def __init__(self, rows: Rows) -> None:
        self.offs = rows.counts.cumsum(0).to(torch.int32)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        if left.dtype == torch.float64:
            raise RequestError('grouped products have no double precision; use backend="loop"')
        return F.grouped_mm(left, right, offs=self.offs)

    def onto(self, rows: Tensor, weight: Tensor) -> Tensor:
        outputs = weight.shape[1]
        extra = padding(outputs, weight.dtype)
        wide = F.pad(_padded(weight), (0, 0, 0, extra)) if extra else _padded(weight)
        return self._product(_padded(rows), wide.transpose(1, 2))[:, :outputs].contiguous()

    def back(self, rows: Tensor, weight: Tensor) -> Tensor:
        inputs = weight.shape[2]
        extra = padding(weight.shape[1], weight.dtype)
        wide = F.pad(_padded(weight), (0, 0, 0, extra)) if extra else _padded(weight)
        return self._product(_padded(rows), wide)[:, :inputs].contiguous()

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        product = self._product(_padded(left).t(), _padded(right))
        return product[:, : left.shape[1], : right.shape[1]].contiguous()


forward = partial(stages.forward, _Grouped)
backward = partial(stages.backward, _Grouped)
