"""Batches of any nesting: made float32, measured, and taken apart by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparing.core.errors import RequestError

HALF = (torch.float16, torch.bfloat16)


def widened(batch: Any) -> Any:
    """The batch with its half-precision tensors in float32, as the model is while it is scored."""
    return changed(batch, lambda t: t.float() if t.dtype in HALF else t)


def changed(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with each tensor changed: tuples, lists and mappings are walked, the rest stays."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(changed(part, change) for part in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(changed(part, change) for part in batch)
    if isinstance(batch, Mapping):
        parts = {key: changed(part, change) for key, part in batch.items()}
        try:
            return type(batch)(parts)  # type: ignore[call-arg]
        except TypeError:
            return parts
    return batch


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    changed(batch, note)
    return found


def size(batch: Any) -> int:
    """The number of samples: the length of the first tensor that has one, 1 without any."""
    return next((t.shape[0] for t in tensors(batch) if t.ndim > 0), 1)


def one(batch: Any) -> Any:
    """The batch's first sample, for what looks at shapes alone; all of it if it has no samples."""
    try:
        return samples(batch)[0]
    except RequestError:
        return batch


def samples(batch: Any) -> list[Any]:
    """The batch as batches of one sample each.

    Raises RequestError if its tensors disagree on the number of samples.
    """
    lengths = {t.shape[0] for t in tensors(batch) if t.ndim > 0}
    if len(lengths) != 1:
        raise RequestError(
            f"the batch cannot be taken apart by sample: its tensors have {sorted(lengths)} rows; "
            f"give batches whose tensors all have the samples on axis 0"
        )
    (count,) = lengths

    def one(number: int) -> Any:
        return changed(batch, lambda t: t[number : number + 1] if t.ndim > 0 else t)

    return [one(number) for number in range(count)]
