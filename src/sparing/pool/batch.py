"""What a pool takes as a batch, and how good an item is among its copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.pool.items import UNLABELLED, Item


def as_items(
    batch: Sequence[Item] | Tensor | NDArray[Any],
    labels: Any,
    keys: Sequence[str] | None,
    prefix: str,
    start: int,
) -> list[Item]:
    """Items of a batch: as they are, or one for each row of a tensor (n, ...)."""
    if not isinstance(batch, Tensor | np.ndarray):
        items = list(batch)
        if labels is not None or keys is not None:
            raise RequestError("items carry their own labels and keys; give those for tensors")
        for item in items:
            if not isinstance(item, Item):
                raise RequestError(f"a batch is a tensor or items, got {type(item).__name__}")
        return items
    rows = batch.detach().cpu().numpy() if isinstance(batch, Tensor) else batch
    if rows.ndim < 2:
        raise RequestError(f"a batch of tensors has shape (n, ...), got {tuple(rows.shape)}")
    for name, given in (("labels", labels), ("keys", keys)):
        if given is not None and len(given) != len(rows):
            raise RequestError(f"{len(given)} {name} came for {len(rows)} items")
    names = keys if keys is not None else [f"{prefix}{start + i}" for i in range(len(rows))]
    marks = [UNLABELLED] * len(rows) if labels is None else [int(label) for label in labels]
    return [
        Item(key=key, tensor=np.array(row), label=label)
        for key, row, label in zip(names, rows, marks, strict=True)
    ]


def quality(item: Item) -> float:
    """How much an item holds: bytes of its image, or letters of its text; 0 for a tensor.

    Of near copies the one that holds most stands for all: an image scaled down or compressed once
    more has fewer bytes than what it was made from, and a text cut short fewer letters.
    """
    if item.image is not None:
        return float(len(item.image))
    return float(len(item.text)) if item.text is not None else 0.0
