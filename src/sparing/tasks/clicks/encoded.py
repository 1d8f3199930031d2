"""Encoded rows of a log, in memory or in files that are mapped into it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.tasks.clicks.columns import Misplaced, arrow, labels, times
from sparing.tasks.clicks.files import Piece
from sparing.tasks.clicks.schema import Schema
from sparing.tasks.clicks.vocabulary import Vocabulary

ARRAYS: Final = ("ids", "numeric", "labels", "time")
_CHUNK: Final = 1 << 20


@final
@dataclass(frozen=True)
class Encoded:
    """``ids`` (N, F) int32, per field; ``numeric`` (N, D) float32; ``labels`` (N,) uint8.

    ``time`` is (N,) int64, in the unit of the time column, zeros without one. The arrays may be
    memory maps. ``bounds``, (K + 1,): the rows of block k are ``bounds[k]`` to ``bounds[k + 1]``;
    blocks are what shuffling reads as a whole.
    """

    ids: NDArray[np.int32]
    numeric: NDArray[np.float32]
    labels: NDArray[np.uint8]
    time: NDArray[np.int64]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each block, (K,) int64."""
        return np.diff(self.bounds)

    def block(self, number: int) -> Encoded:
        """The rows of one block, as views."""
        return self.rows(slice(int(self.bounds[number]), int(self.bounds[number + 1])))

    def rows(self, chosen: Any) -> Encoded:
        """Those rows: a slice, positions (n,) int64, or a mask (N,) bool."""
        return joined([(self, chosen)])

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The rows ``index``, (B,) int64: ids int64, numeric and labels float32, as tensors."""
        return tensors(self.rows(index.numpy()))

    def check(self, sizes: Sequence[int], names: Sequence[str] | None = None) -> None:
        """Raise RequestError, with column, row and value, for an id that its field has not."""
        limits = np.asarray(sizes)
        if self.ids.ndim != 2 or self.ids.shape[1] != len(limits):
            raise RequestError(f"ids must be (rows, {len(limits)}), got {self.ids.shape}")
        for start in range(0, len(self), 1 << 20):
            part = self.ids[start : start + (1 << 20)]
            wrong = (part < 0) | (part >= limits)
            if wrong.any():
                row, field = (int(x) for x in np.argwhere(wrong)[0])
                name = names[field] if names else f"number {field + 1}"
                raise Misplaced(
                    name, start + row, int(part[row, field]), f"an id from 0 to {limits[field] - 1}"
                )

    def save(self, folder: Path) -> None:
        """Write one npy file an array into ``folder``, which is there."""
        for name in (*ARRAYS, "bounds"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path, *, mapped: bool = False) -> Encoded:
        """What ``save`` wrote, read-only if ``mapped``. OSError and ValueError as numpy raises."""
        mode: Any = "r" if mapped else None
        arrays = [
            np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in ARRAYS
        ]
        return cls(
            **dict(zip(ARRAYS, arrays, strict=True)),
            bounds=np.load(folder / "bounds.npy", allow_pickle=False),
        )

    @classmethod
    def empty(cls, rows: int, fields: int, numbers: int, folder: Path | None = None) -> Encoded:
        """Room for ``rows``; in files of ``folder`` if given. One block."""
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "ids": ((rows, fields), np.int32),
            "numeric": ((rows, numbers), np.float32),
            "labels": ((rows,), np.uint8),
            "time": ((rows,), np.int64),
        }
        arrays = []
        for name, (shape, dtype) in shapes.items():
            if folder is None or 0 in shape:
                array = np.empty(shape, dtype)
                if folder is not None:
                    np.save(folder / f"{name}.npy", array)
            else:
                file = folder / f"{name}.npy"
                array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
                _reserve(file, array.offset)
            arrays.append(array)
        return cls(**dict(zip(ARRAYS, arrays, strict=True)), bounds=np.array([0, rows]))

    def flush(self) -> None:
        """Force what is mapped to the disk."""
        for name in ARRAYS:
            array = getattr(self, name)
            if isinstance(array, np.memmap):
                array.flush()

    def put_(self, place: Any, other: Encoded) -> None:
        """Write the rows of ``other`` to a slice, or to positions (n,) int64."""
        for name in ARRAYS:
            getattr(self, name)[place] = getattr(other, name)


def _reserve(file: Path, offset: int) -> None:
    """Take the room of a file of zeros from ``offset`` on: a full disk would kill who maps it.

    Raises OSError where there is too little.
    """
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
            return
        # macOS has no such call; what is written has its room
        for start in range(offset, size, _CHUNK):
            opened.seek(start)
            opened.write(bytes(min(_CHUNK, size - start)))
        os.fsync(opened.fileno())


def tensors(rows: Encoded) -> dict[str, Tensor]:
    """Rows as a batch: ids (B, F) int64, numeric (B, D) float32, labels (B,) float32."""
    return {
        "ids": torch.from_numpy(rows.ids.astype(np.int64)),
        "numeric": torch.from_numpy(rows.numeric.astype(np.float32)),
        "labels": torch.from_numpy(rows.labels.astype(np.float32)),
    }


def joined(parts: Sequence[tuple[Encoded, Any]]) -> Encoded:
    """Chosen rows of several, one after the other: each a slice or positions (n,) int64."""
    found: dict[str, Any] = {}
    for name in ARRAYS:
        chosen = [_of(getattr(rows, name), places) for rows, places in parts]
        found[name] = chosen[0] if len(chosen) == 1 else np.concatenate(chosen)
    return Encoded(**found, bounds=np.array([0, len(found["labels"])]))


def _of(array: NDArray[Any], places: Any) -> NDArray[Any]:
    if isinstance(places, slice) or places.dtype == np.bool_:
        chosen: NDArray[Any] = array[places]
    else:  # copies rows whole, where indexing by an array goes value by value
        chosen = array.take(places, axis=0)
    return chosen


def encode(
    piece: Piece, schema: Schema, vocabulary: Vocabulary, kept: NDArray[np.bool_] | None = None
) -> Encoded:
    """The rows of a piece, or those ``kept``, (n,) bool.

    Raises Misplaced, as a row of the file, for what is no label, category or number.
    """
    batch = piece.batch
    if kept is not None:
        batch = batch.filter(kept)
    with telling(piece, kept):
        label = labels(arrow(batch[schema.label]), schema.label)
        return Encoded(
            vocabulary.codes(batch),
            vocabulary.numeric(batch),
            label,
            time_of(batch, schema),
            np.array([0, len(label)]),
        )


@contextmanager
def telling(piece: Piece, kept: NDArray[np.bool_] | None) -> Iterator[None]:
    """Tell what is misplaced in the rows ``kept`` of a piece as a row of its file."""
    try:
        yield
    except Misplaced as error:
        row = error.row if kept is None else int(np.flatnonzero(kept)[error.row])
        raise Misplaced(
            error.column, piece.first + row, error.value, error.expected, str(piece.file)
        ) from error


def time_of(batch: Any, schema: Schema) -> NDArray[np.int64]:
    """(n,) int64, zeros without a time column. Raises Misplaced for a missing time."""
    if schema.time is None:
        return np.zeros(len(batch), dtype=np.int64)
    return times(arrow(batch[schema.time]), schema.time)
