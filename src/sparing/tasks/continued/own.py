"""Text that the model writes itself: what it has learned, where its training data is not at hand.

Kept in the user's cache under a hash of the model's files and all that decides the text.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparing.core.cache import cache_folder
from sparing.core.decoding import continued, first_token
from sparing.core.errors import RunError
from sparing.core.state import atomic_save
from sparing.tasks.causal import weights_of

_PROTOCOL = 1  # raise it whenever other text would be drawn for the same request
_SMALL = 10_000_000
_ROWS = {True: 512, False: 32}
"""Rows drawn together by models of at most so many parameters, and by larger ones: the memory of
keys and values grows with both."""


def written(
    model: nn.Module, folder: Path, rows: int, length: int, *, seed: int, temperature: float
) -> Tensor:
    """``rows`` texts of ``length`` tokens, (rows, length) int64, from the first token on.

    Whatever ends within a row is followed by what the model writes next, as in training. Raises
    RequestError for a model that names no first token.
    """
    first = first_token(model.config)
    key = _key(folder, rows, length, seed, temperature)
    path = cache_folder() / f"own-{key}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        kept = load_file(path)["ids"].long()
        if kept.shape == (rows, length):
            return kept
    generator = torch.Generator().manual_seed(seed)
    small = sum(p.numel() for p in model.parameters()) <= _SMALL
    parts = []
    for start in range(0, rows, _ROWS[small]):
        begun = torch.full((min(_ROWS[small], rows - start), 1), first)
        drawn = continued(model, begun, length - 1, generator=generator, temperature=temperature)
        parts.append(torch.cat([begun, drawn], dim=1))
    found = torch.cat(parts)
    with suppress(RunError):  # a cache that cannot be written only costs the time again
        atomic_save(path, {"ids": found.to(torch.int32)})
    return found


def hash_of(folder: Path) -> str:
    """SHA-256 over a model's configuration and weights."""
    digest = hashlib.sha256()
    for file in (folder / "config.json", *weights_of(folder)):
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _key(folder: Path, *told: Any) -> str:
    whole = "/".join(map(str, (_PROTOCOL, hash_of(folder), *told)))
    return hashlib.sha256(whole.encode()).hexdigest()[:32]
