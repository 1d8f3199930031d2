"""A training set as vectors: what a host reads, in the order of its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparing.core.errors import RequestError
from sparing.core.method import Setup
from sparing.pool import encoders
from sparing.pool.items import Item
from sparing.pool.training import cache

AT_ONCE: Final = 512
"""Samples that are read and encoded together."""
_NAMES: Final = ("images", "pixel_values", "input_ids", "x", "inputs")


def samples_of(batch: Any) -> Tensor:
    """What a batch's samples are: its images, ids or other tensor with a row for each, (B, ...).

    Raises RequestError for a batch without one.
    """
    if isinstance(batch, Tensor):
        return batch
    parts = batch if isinstance(batch, Mapping) else dict(enumerate(batch))
    named = [parts[name] for name in _NAMES if name in parts]
    several = [part for part in parts.values() if isinstance(part, Tensor) and part.ndim > 1]
    for found in (*named, *several):
        if isinstance(found, Tensor):
            return found
    raise RequestError(
        f"growth looks at one tensor of a batch, such as {', '.join(_NAMES)}, and found none in "
        f"{sorted(map(str, parts))}; give vectors yourself, as in GrowthSelection(vectors=...)"
    )


def labels(batch: Any) -> Tensor | None:
    """The classes (B,) int64 that come with a batch under ``labels`` or ``y``, None without."""
    for name in ("labels", "y"):
        part = batch.get(name) if isinstance(batch, Mapping) else None
        if isinstance(part, Tensor) and part.ndim == 1 and not part.is_floating_point():
            return part
    return None


@final
@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """vectors: (N, d) float32; labels: (N,) int64 or None; marks: (N,) hashes of the contents.

    flops: what the encoder spent on the vectors, now or when they were made.
    """

    vectors: Tensor
    labels: Tensor | None
    marks: NDArray[np.uint64]
    flops: int = 0


def read(setup: Setup, name: str, **options: Any) -> TrainingSet:
    """All samples of a host's training set, by the encoder of that name, with its options.

    Labels are those of the batches, else the domains. Vectors of an encoder that is a network are
    kept in the user's cache. Raises RequestError where the host cannot read, for an unknown
    encoder, and for samples that it cannot encode.
    """
    if setup.read is None or setup.size is None:
        raise RequestError("growth reads the training data before training, and this host cannot")
    encode = Encode(name, setup.device, **options)
    parts = torch.split(torch.arange(setup.size), AT_ONCE)
    classes, marks, digest = [], [], hashlib.sha256()
    for part in parts:
        batch = setup.read(part)
        rows = samples_of(batch).detach().cpu().contiguous()
        marks.append(content(rows))
        digest.update(f"{rows.dtype}{tuple(rows.shape)}".encode())
        digest.update(rows.flatten().view(torch.uint8).numpy().data)
        known = labels(batch)
        if known is None and setup.domain_of is not None:
            known = setup.domain_of(part)
        if known is not None:
            classes.append(known.cpu().long())
    path = cache.place(encode.version, digest.hexdigest())
    found = cache.kept(path, setup.size) if encode.slow else None
    if found is None:
        vectors = torch.cat([encode(samples_of(setup.read(part))) for part in parts])
        found = vectors, encode.flops
        if encode.slow:
            cache.keep(path, vectors, torch.tensor(encode.flops))
    return TrainingSet(
        vectors=found[0],
        labels=torch.cat(classes) if len(classes) == len(parts) else None,
        marks=np.concatenate(marks),
        flops=found[1],
    )


@final
class Encode:
    """Samples (B, ...) to rows of length 1, (B, d) float32: see ``sparing.pool.encoders``.

    Rows of whole numbers, such as ids of tokens, are counted by a hash: their size means nothing.
    ``flops`` counts what was spent so far.
    """

    def __init__(self, name: str, device: str = "cpu", **options: Any) -> None:
        self._encoder = encoders.encoder(name, device=device, **options)
        self.slow = name != "pixels"
        self.version = self._encoder.version
        self.flops = 0
        self._each: float | None = None

    def __call__(self, samples: Tensor) -> Tensor:
        samples = samples.detach().cpu().contiguous()
        if samples.ndim == 2 and not samples.is_floating_point():
            return counted(samples)
        items = [Item(key=str(at), tensor=row) for at, row in enumerate(samples.numpy())]
        if self._each is None and self.slow:  # the rest costs as much as the first
            counter = FlopCounterMode(display=False)
            with counter:
                main = self._encoder(items).main
            self._each = counter.get_total_flops() / len(items)
        else:
            main = self._encoder(items).main
        self.flops += round(len(items) * (self._each or 0))
        lengths = np.linalg.norm(main.astype(np.float64), axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            at = int(np.flatnonzero(~(lengths[:, 0] > 0))[0])
            raise RequestError(
                f"the encoder {self.version} gives sample {at} of a batch a vector without a "
                "direction; look at that sample, or take another encoder"
            )
        return torch.from_numpy((main / lengths).astype(np.float32))


def content(rows: Tensor) -> NDArray[np.uint64]:
    """A hash of each row by its bits alone: (N, ...) -> (N,)."""
    flat = rows.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    words = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 8))).view(np.uint64)
    odd = np.arange(1, 2 * words.shape[1], 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = words ^ (words >> np.uint64(29))
    mixed *= np.uint64(0xBF58476D1CE4E5B9) * (odd | np.uint64(1))
    found: NDArray[np.uint64] = mixed.sum(1, dtype=np.uint64)
    found ^= found >> np.uint64(31)
    return found


def counted(ids: Tensor, dim: int = 128) -> Tensor:
    """Ids (B, length) as signed counts of them and of their pairs: (B, dim), of length 1.

    Feature hashing, Weinberger et al. 2009 (arXiv 0902.2206).
    """
    ids = ids.long()
    pairs = ids[:, 1:] * 1_000_003 + ids[:, :-1] + 7
    words = torch.cat([ids, pairs], dim=1)
    mixed = (words * 2_654_435_761 + 12_345) & 0x7FFFFFFF
    sign = ((mixed >> 8) & 1) * 2.0 - 1.0
    found = torch.zeros(len(ids), dim, device=ids.device)
    found[:, 0] = 1e-3  # counts that cancel out have a direction too
    return F.normalize(found.scatter_add_(1, (mixed >> 12) % dim, sign), dim=1)
