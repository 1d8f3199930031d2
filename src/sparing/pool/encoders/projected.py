"""Fewer dimensions than an encoder gives, by a fixed random projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_whole
from sparing.pool.encoders import Encoder, unit
from sparing.pool.items import Item, Vectors

_SEED: Final = 20_240_528


def projection(width: int, dim: int) -> NDArray[np.float32]:
    """(width, dim) of independent normal values, always the same; keeps lengths in the mean."""
    drawn = np.random.Generator(np.random.Philox(_SEED)).standard_normal((width, dim))
    made: NDArray[np.float32] = (drawn / dim**0.5).astype(np.float32)
    return made


def projected(encoder: Encoder, dim: int | None) -> Encoder:
    """The encoder with vectors of ``dim`` values; itself for None or its own number.

    Distances keep their order up to about 1 / sqrt(dim) (Johnson and Lindenstrauss 1984).
    """
    if dim is None or dim == encoder.dim:
        return encoder
    require_whole("dim", dim, 1)
    return Projected(encoder, dim)


@final
class Projected:
    """What ``projected`` gives."""

    def __init__(self, encoder: Encoder, dim: int) -> None:
        self.encoder, self._dim = encoder, dim
        self._matrix = projection(encoder.dim, dim)

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def version(self) -> str:
        return f"{self.encoder.version}-projected-{self._dim}"

    def __call__(self, items: Sequence[Item]) -> Vectors:
        found = self.encoder(items)
        second = None if found.second is None else unit(found.second)[0] @ self._matrix
        return Vectors(main=unit(found.main)[0] @ self._matrix, second=second)
