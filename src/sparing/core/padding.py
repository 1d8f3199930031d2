"""Which tokens are real, and of which sample: read from what a model is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def real_tokens(mask: Any) -> Tensor | None:
    """(B, S) bool of an attention mask, None where it does not tell.

    A mask (B, S) is above 0 where a token is real. A bool mask (B, 1, S, S), which says who sees
    whom, as packed sequences need it: a real token sees itself, and one that does not is padding.
    """
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask > 0
    if mask.ndim == 4 and mask.dtype == torch.bool and mask.shape[-1] == mask.shape[-2]:
        return mask[:, 0].diagonal(dim1=-2, dim2=-1)
    return None


def owners(batch: Any) -> Tensor | None:
    """Whose each token of a batch of packed samples is, None of batches that are not packed.

    The batch's ``owner``: (R, S) int64, positions in the batch's B samples, -1 for padding.
    """
    found = batch.get("owner") if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) and found.ndim == 2 else None
