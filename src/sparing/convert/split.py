"""Which hidden units of a block go to which expert, and the plain ways to deal them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparing.core.errors import RequestError

ALIGNED = 16
"""Rows of this many bytes are what grouped matrix products take."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The hidden units of one block, dealt out.

    index: (E, w) int64, the units of each routed expert; -1 is a unit of zeros that fills up.
    shared: (s,) int64, the units that are always on; -1 as well.
    """

    index: Tensor
    shared: Tensor

    @property
    def width(self) -> int:
        """Hidden units of each expert, those of zeros too."""
        return int(self.index.shape[1])

    def counts(self, units: int) -> Tensor:
        """How often each of ``units`` hidden units occurs, (units,) int64."""
        every = torch.cat([self.index.flatten(), self.shared])
        return torch.bincount(every[every >= 0], minlength=units)

    def once(self, units: int) -> bool:
        """Whether each hidden unit occurs exactly once."""
        counts = self.counts(units)
        return counts.shape[0] == units and bool((counts == 1).all())


def split(groups: Sequence[Tensor], shared: Tensor | None = None, *, itemsize: int = 4) -> Split:
    """Groups of hidden units as a Split, filled up to one width.

    groups: a vector of units for each expert; shared: those always on. The width is a multiple of
    16 bytes at ``itemsize`` bytes a number.
    """
    step = max(1, ALIGNED // itemsize)
    width = _up(max(len(group) for group in groups), step)
    index = torch.full((len(groups), width), -1, dtype=torch.int64)
    for row, group in zip(index, groups, strict=True):
        row[: len(group)] = group.sort().values
    always = torch.empty(0, dtype=torch.int64) if shared is None else shared.sort().values
    filled = torch.full((_up(len(always), step),), -1, dtype=torch.int64)
    filled[: len(always)] = always
    return Split(index=index, shared=filled)


def sizes(units: int, experts: int) -> list[int]:
    """How many hidden units each expert has: as even as whole numbers allow, the larger first.

    Raises RequestError if there are fewer units than experts.
    """
    if units < experts:
        raise RequestError(
            f"a block of {units} hidden units cannot be cut into {experts} experts; take fewer"
        )
    each, more = divmod(units, experts)
    return [each + 1] * more + [each] * (experts - more)


def deal(order: Tensor, experts: int, residual: int = 0) -> tuple[list[Tensor], Tensor]:
    """Cut units in this order into the routed experts' groups and the residual experts' units."""
    parts = list(torch.split(order, sizes(len(order), experts)))
    routed = parts[residual:]
    always = torch.cat(parts[:residual]) if residual else order[:0]
    return routed, always


def at_random(
    units: int, experts: int, residual: int, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """Groups drawn at random without overlap (LLaMA-MoE's Independent-Random).

    The published code labels units by a list that is too short unless experts divide the width.
    """
    return deal(torch.randperm(units, generator=generator), experts, residual)


def contiguous(units: int, experts: int, residual: int) -> tuple[list[Tensor], Tensor]:
    """Groups of neighbouring units (LLaMA-MoE v2's vanilla split)."""
    return deal(torch.arange(units), experts, residual)


def pick(rows: Tensor, index: Tensor, dim: int = 0) -> Tensor:
    """Slices of ``rows`` along ``dim`` by index, zeros for -1; index: any shape of one axis."""
    found = rows.index_select(dim, index.clamp_min(0))
    missing = (index < 0).nonzero().flatten()
    return found.index_fill(dim, missing, 0) if len(missing) else found


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
