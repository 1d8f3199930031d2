"""Masks that move while training: some entries leave, as many others come (SET, RigL)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.core.select import choose, rounded


@final
@dataclass(frozen=True, slots=True)
class Move:
    """The mask after a step, bool; and what came with it, as flat indices (k,), ascending.

    What came begins at 0, with no optimizer state.
    """

    mask: Tensor
    grown: Tensor


def set_step(mask: Tensor, weight: Tensor, share: float, generator: torch.Generator) -> Move:
    """A step of SET (Mocanu et al. 2018): a new mask, of which as many are kept as before.

    The ``round(share * kept)`` kept entries of least magnitude leave, and as many come that were
    outside before, drawn uniformly from ``generator`` (on the CPU); never more than there are
    outside. Ties leave from the lowest index on. mask: bool, of the shape of ``weight``.
    Raises RequestError for shapes or dtypes that do not fit, a weight with NaN, a bad share.
    """
    flat, moved = _request(mask, weight, share)
    outside = (~flat).nonzero().squeeze(1)
    _drop_(flat, weight, moved)
    drawn = torch.randperm(outside.numel(), generator=generator)[:moved].sort().values
    return _grown(flat, outside[drawn.to(outside.device)], mask)


def rigl_step(mask: Tensor, weight: Tensor, gradient: Tensor, share: float) -> Move:
    """A step of RigL (Evci et al. 2020): as ``set_step``, but by gradient.

    The entries come whose ``gradient`` (of the dense weight, its shape) is largest in magnitude,
    ties from the lowest index on. As in the paper an entry that has just left may come back, at
    0; ``grown`` then has it. Raises what ``set_step`` raises, and for a gradient with NaN.
    """
    if gradient.shape != mask.shape:
        raise RequestError(
            f"the gradient has shape {tuple(gradient.shape)}, the mask {tuple(mask.shape)}"
        )
    flat, moved = _request(mask, weight, share)
    _drop_(flat, weight, moved)
    outside = (~flat).nonzero().squeeze(1)
    best = choose(gradient.detach().reshape(-1)[outside].abs(), moved)
    return _grown(flat, outside[best], mask)


def share_at(step: int, *, share: float, end: int) -> float:
    """The share that moves at an optimizer step: half a cosine from ``share`` to 0 at ``end``.

    Evci et al. 2020, equation 1. Raises RequestError for numbers out of their range.
    """
    require_whole("step", step, 0)
    require_whole("end", end, 1)
    require_number("share", share, 0, 1)
    return share / 2 * (1 + math.cos(math.pi * min(step, end) / end))


def _request(mask: Tensor, weight: Tensor, share: float) -> tuple[Tensor, int]:
    """The mask as a flat copy, and how many entries move."""
    require_number("share", share, 0, 1)
    if mask.dtype != torch.bool:
        raise RequestError(f"a mask is of torch.bool, got {mask.dtype}")
    if mask.shape != weight.shape:
        raise RequestError(
            f"the weight has shape {tuple(weight.shape)}, the mask {tuple(mask.shape)}"
        )
    kept = int(mask.sum())
    return mask.reshape(-1).clone(), min(rounded(share, kept), mask.numel() - kept)


def _drop_(flat: Tensor, weight: Tensor, moved: int) -> None:
    kept = flat.nonzero().squeeze(1)
    least = choose(weight.detach().reshape(-1)[kept].abs(), moved, largest=False)
    flat[kept[least]] = False


def _grown(flat: Tensor, come: Tensor, mask: Tensor) -> Move:
    flat[come] = True
    return Move(flat.reshape(mask.shape), come)
