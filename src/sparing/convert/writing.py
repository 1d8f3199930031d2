"""Safetensors files written one tensor at a time, so that memory holds one and not the file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from sparing.convert.checkpoint import NAMES

Told = Callable[[str, int, int], None]
"""What is told of progress: a stage, and done of total."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor to write: its name, type and shape are known before ``make`` computes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: Path, entries: Iterable[Entry], *, note: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Write the entries to a safetensors file; returns its size and SHA-256.

    ``note(bytes)`` is told of each tensor that was written. Entries are ordered by the size of
    their type, largest first, so that each begins at a multiple of it.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for entry in ordered:
            data = _bytes(entry)
            file.write(data)
            digest.update(data)
            if note is not None:
                note(entry.size)
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}


def write_all(
    folder: Path, files: Mapping[str, Iterable[Entry]], told: Told
) -> dict[str, dict[str, Any]]:
    """Write each file into ``folder``; what ``write`` gives, by file. ``told`` counts bytes."""
    entries = {file: list(held) for file, held in files.items()}
    total, done = sum(entry.size for held in entries.values() for entry in held), 0

    def wrote(size: int) -> None:
        nonlocal done
        done += size
        told("writing", done, total)

    return {file: write(folder / file, held, note=wrote) for file, held in entries.items()}


def index_of(files: Mapping[str, Iterable[Entry]]) -> dict[str, Any]:
    """The index of several files, as Hugging Face's tools read it."""
    entries = {file: list(held) for file, held in files.items()}
    return {
        "metadata": {"total_size": sum(e.size for held in entries.values() for e in held)},
        "weight_map": {e.name: file for file, held in entries.items() for e in held},
    }


def _bytes(entry: Entry) -> memoryview:
    tensor = entry.make().detach()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise AssertionError(
            f"{entry.name} was announced as {entry.dtype} {entry.shape} and is {tensor.dtype} "
            f"{tuple(tensor.shape)}"
        )
    if not tensor.numel():
        return memoryview(b"")
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
