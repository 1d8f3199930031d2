"""What a pool takes as a batch, and how good an item is among its copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.errors import RequestError, unknown
from sparing.pool.items import REASONS, UNLABELLED, Drop, Item


def as_items(
    batch: Sequence[Item] | Tensor | NDArray[Any],
    labels: Any,
    keys: Sequence[str] | None,
    prefix: str,
    start: int,
) -> list[Item]:
    """Items of a batch: as they are, or one for each row of a tensor (n, ...)."""
    if not isinstance(batch, Tensor | np.ndarray):
        if not isinstance(batch, Sequence):
            raise RequestError(f"a batch is a tensor or items, got {type(batch).__name__}")
        items = list(batch)
        if labels is not None or keys is not None:
            raise RequestError("items carry their own labels and keys; give those for tensors")
        for item in items:
            _require_item(item)
        return items
    rows = _array(batch) if isinstance(batch, Tensor) else batch
    if rows.ndim < 2:
        raise RequestError(f"a batch of tensors has shape (n, ...), got {tuple(rows.shape)}")
    if rows.dtype.kind not in "biuf":
        raise RequestError(f"a batch of tensors holds real numbers, got {rows.dtype}")
    for name, given in (("labels", labels), ("keys", keys)):
        if given is not None and len(given) != len(rows):
            raise RequestError(f"{len(given)} {name} came for {len(rows)} items")
    names = [f"{prefix}{start + i}" for i in range(len(rows))] if keys is None else list(keys)
    for key in names if keys is not None else ():
        if not isinstance(key, str):
            raise RequestError(f"keys are texts, got {key!r}")
    marks = [UNLABELLED] * len(rows) if labels is None else classes(labels)
    # one copy for all; a row is a view of it
    held = np.array(rows, order="C")
    return [
        Item(key=key, tensor=row, label=label)
        for key, row, label in zip(names, held, marks, strict=True)
    ]


def classes(labels: Any) -> list[int]:
    """Labels (n,) as whole numbers from -1 on. Raises RequestError for others, 1.5 and NaN too."""
    try:
        given = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    except (ValueError, TypeError) as error:  # rows of several lengths, say
        raise RequestError(f"labels are a vector of whole numbers ({error})") from error
    if not given.size:
        return []
    if given.ndim != 1 or given.dtype.kind not in "biuf":
        raise RequestError(
            f"labels are a vector of whole numbers, got {given.dtype} of shape {given.shape}; "
            "number the classes where they are words"
        )
    if given.dtype.kind == "b":
        given = given.astype(np.int64)
    limit = 2**63 if given.dtype.kind != "f" else 2**53  # floats above hold no exact number
    with np.errstate(invalid="ignore"):
        wrong = ~((given >= UNLABELLED) & (given < limit) & (given == np.floor(given)))
    if wrong.any():
        raise RequestError(
            f"labels are whole numbers from 0 on, or -1 without one; number {int(wrong.argmax())} "
            f"is {given[wrong][0]}"
        )
    return [int(label) for label in given.tolist()]


def whole(ids: Any) -> NDArray[np.int64]:
    """Ids (n,) as whole numbers. Raises RequestError for what only could be made such."""
    given = np.asarray(ids)
    if not given.size:
        return np.empty(0, np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise RequestError(
            f"ids are a vector of whole numbers, got {given.dtype} of shape {given.shape}"
        )
    return given.astype(np.int64, copy=False)


def require_source(source: object, drops: Sequence[Drop]) -> None:
    """Raise RequestError for a source without a name, and drops for no known reason."""
    if not isinstance(source, str) or not source:
        raise RequestError(f"a source needs a name, got {source!r}")
    for drop in drops:
        if drop.reason not in REASONS:
            raise unknown("reason", drop.reason, REASONS)


def _require_item(item: object) -> None:
    if not isinstance(item, Item):
        raise RequestError(f"a batch is a tensor or items, got {type(item).__name__}")
    parts = (item.image, bytes), (item.text, str), (item.tensor, np.ndarray)
    wrong = [kind for part, kind in parts if part is not None and not isinstance(part, kind)]
    if not isinstance(item.key, str) or wrong:
        raise RequestError(
            f"{item.key!r}: an item's key and text are str, its image bytes, its tensor an array"
        )
    label = item.label
    if not isinstance(label, int | np.integer) or not UNLABELLED <= label < 2**63:
        raise RequestError(
            f"{item.key}: a label is a whole number from 0 on, or -1 without one, got {label!r}"
        )


def _array(batch: Tensor) -> NDArray[Any]:
    if batch.layout is not torch.strided or batch.is_complex():
        kind = "complex numbers" if batch.is_complex() else f"the layout {batch.layout}"
        raise RequestError(f"a batch of tensors is dense and of real numbers, got {kind}")
    held = batch.detach().cpu()
    if held.is_floating_point() and held.dtype not in (torch.float16, torch.float32, torch.float64):
        held = held.float()  # NumPy knows no bfloat16
    found: NDArray[Any] = held.numpy()
    return found


def quality(item: Item) -> float:
    """How much an item holds: bytes of its image, or letters of its text; 0 for a tensor.

    Of near copies the one that holds most stands for all: an image scaled down or compressed once
    more has fewer bytes than what it was made from, and a text cut short fewer letters.
    """
    if item.image is not None:
        return float(len(item.image))
    return float(len(item.text)) if item.text is not None else 0.0
