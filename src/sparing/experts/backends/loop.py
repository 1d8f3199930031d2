"""A loop over the experts that have rows: every expert's elementwise work stays in the cache.

The fastest on a processor, and the only fast backend in double precision. Rows are gathered,
multiplied and activated one expert (and at most ``CHUNK`` rows) at a time in buffers that all
experts share, and every result goes straight to its place in a tensor allocated once.

Half precision on a processor without matrix units for it is storage only: each expert's weights
and rows are widened as their turn comes, and the arithmetic is in single precision, which is both
faster there and more exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor

from sparing.experts.backends.activations import ACTIVATIONS
from sparing.experts.backends.parts import Forward, Grads, Needs, Nets, Rows, combine, like

CHUNK = 1024
"""Rows that are computed at a time: bounds the buffers when one expert takes every token."""


class _Piece(NamedTuple):
    expert: int
    start: int
    stop: int
    first: bool
    last: bool


def _pieces(counts: list[int]) -> Iterator[_Piece]:
    start = 0
    for expert, count in enumerate(counts):
        end = start + count
        for at in range(start, end, CHUNK):
            yield _Piece(expert, at, min(at + CHUNK, end), at == start, at + CHUNK >= end)
        start = end


def arithmetic(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for a dtype to store in."""
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    matrix_units = dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16", False)
    return dtype if matrix_units else torch.float32


@final
class _Desk:
    """Buffers by name, each allocated once and used by all pieces, in the dtype of arithmetic."""

    def __init__(self, x: Tensor, counts: list[int]) -> None:
        self.dtype, self.device = arithmetic(x.device.type, x.dtype), x.device
        self.size = min(CHUNK, max(counts, default=0))
        self.kept: dict[str, Tensor] = {}

    def rows(self, name: str, n: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """An (n, width) buffer, contents undefined."""
        if name not in self.kept:
            self.kept[name] = torch.empty(
                self.size, width, dtype=dtype or self.dtype, device=self.device
            )
        return self.kept[name][:n]

    def lift(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in the dtype of arithmetic: itself, or a copy in a buffer."""
        return tensor if tensor.dtype == self.dtype else self.place(name, tensor).copy_(tensor)

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """Where to compute the tensor's contents: itself, or a buffer for ``put``."""
        if tensor.dtype == self.dtype:
            return tensor
        if tensor.ndim == 2 and tensor.shape[0] <= self.size:
            return self.rows(name, tensor.shape[0], tensor.shape[1])
        if name not in self.kept:
            self.kept[name] = torch.empty(tensor.shape, dtype=self.dtype, device=self.device)
        return self.kept[name]

    def take(self, name: str, source: Tensor, index: Tensor) -> Tensor:
        """The rows of ``source`` at ``index``, in the dtype of arithmetic."""
        own = self.rows(f"{name}, stored", index.shape[0], source.shape[1], source.dtype)
        return self.lift(name, torch.index_select(source, 0, index, out=own))


def _put(tensor: Tensor, computed: Tensor) -> None:
    """Store what was computed in ``place``."""
    if computed.dtype != tensor.dtype:
        tensor.copy_(computed)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


def _unbind(stacked: Tensor | None) -> list[Tensor]:
    return [] if stacked is None else list(stacked.unbind())
