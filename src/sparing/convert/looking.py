"""A training loop's own batches and loss, as calibration reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from sparing.convert.reading import Batch
from sparing.core.errors import RequestError
from sparing.core.method import Setup
from sparing.core.padding import real_tokens


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """What ``Looked`` answers: the loss, a scalar."""

    loss: Tensor


@final
class Looked(nn.Module):
    """A model that is given a loop's batches, and answers with the loop's loss."""

    def __init__(self, model: nn.Module, setup: Setup) -> None:
        super().__init__()
        self.model, self._setup = model, setup

    def forward(self, batch: Any, **told: Tensor) -> Answer:
        assert self._setup.loss is not None
        return Answer(self._setup.loss(self.model, batch))


def batches_of(setup: Setup, sequences: int) -> list[Batch]:
    """The loop's first batches in its fixed order, until they have that many rows.

    As ``Looked`` takes them: ``rows`` (B,) tells how many, ``attention_mask`` (B, S) what is
    padding. Raises RequestError for a loop that knows no data or no loss.
    """
    if setup.batches is None or setup.loss is None:
        raise RequestError(
            "conversion looks at training data and its loss, which this loop does not tell; take "
            'text="own", or a method, scale and gate that need none'
        )
    found: list[Batch] = []
    rows = 0
    for batch in setup.batches():
        here = on_cpu(batch)
        count = rows_of(here)
        mask = real_tokens(here.get("attention_mask") if isinstance(here, Mapping) else None)
        told: dict[str, Any] = {"rows": torch.empty(count), "batch": here}
        found.append(told if mask is None else {**told, "attention_mask": mask.long()})
        rows += count
        if rows >= sequences:
            break
    return found


def rows_of(batch: Any) -> int:
    """How many rows the model reads of a batch: the length of its first tensor."""
    for tensor in _tensors(batch):
        return len(tensor)
    raise RequestError(f"a batch of {type(batch).__name__} holds no tensor to convert by")


def on_cpu(batch: Any) -> Any:
    """The batch with its tensors on the CPU."""
    if isinstance(batch, Tensor):
        return batch.cpu()
    if isinstance(batch, Mapping):
        return {key: on_cpu(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [on_cpu(value) for value in batch]
    return batch


def _tensors(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
