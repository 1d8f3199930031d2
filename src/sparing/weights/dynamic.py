"""Masks that move while training: some entries leave, as many others come (SET, RigL)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.core.select import choose, rounded


def set_(mask: Tensor, weight: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A step of SET (Mocanu et al. 2018), in place: what came, as flat indices (k,), ascending.

    The ``round(share * kept)`` kept entries of least magnitude leave ``mask`` (bool, of weight's
    shape), and as many come that were outside before, drawn uniformly from ``generator`` (CPU).
    Never more move than there are outside. The count stays; ties leave from the lowest index on.
    What comes is to begin at 0, with no optimizer state; so is ``weight`` left to the caller.
    Raises RequestError for shapes or dtypes that do not fit, scores with NaN, a bad share.
    """
    flat, moved = _request(mask, weight, share)
    outside = (~flat).nonzero().squeeze(1)
    _drop_(flat, weight, moved)
    drawn = torch.randperm(outside.numel(), generator=generator)[:moved].sort().values
    come = outside[drawn.to(outside.device)]
    flat[come] = True
    mask.copy_(flat.reshape(mask.shape))
    return come


def rigl_(mask: Tensor, weight: Tensor, gradient: Tensor, share: float) -> Tensor:
    """A step of RigL (Evci et al. 2020), in place: what came, as flat indices (k,), ascending.

    As ``set_``, but the entries come whose ``gradient`` (of the dense weight) is largest in
    magnitude, ties from the lowest index on. As in the paper an entry that has just left may come
    back, at 0; ``come`` then has it. Raises what ``set_`` raises.
    """
    if gradient.shape != mask.shape:
        raise RequestError(
            f"the gradient has shape {tuple(gradient.shape)}, the mask {tuple(mask.shape)}"
        )
    flat, moved = _request(mask, weight, share)
    _drop_(flat, weight, moved)
    outside = (~flat).nonzero().squeeze(1)
    come = outside[choose(gradient.detach().reshape(-1)[outside].abs(), moved)]
    flat[come] = True
    mask.copy_(flat.reshape(mask.shape))
    return come


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
