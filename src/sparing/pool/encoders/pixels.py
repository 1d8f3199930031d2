"""The encoder that needs nothing: an image made small, centred and projected at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sparing.core.checks import require_whole
from sparing.pool.encoders import UnreadableError, unit
from sparing.pool.encoders.images import pictures, squares
from sparing.pool.encoders.projected import projection
from sparing.pool.items import Item, Vectors

SIDE: Final = 16
"""Images are averaged to SIDE x SIDE pixels of three colours."""
_BRIGHTNESS: Final = 0.25
"""How much the mean colours count beside the pattern, whose root mean square is the unit."""
_FLOOR: Final = 0.02
"""A constant entry, so that a grey image too has a direction."""


@final
class Pixels:
    """Images (files, or tensors (C, H, W) or (H, W)) by their coarse pattern; no weights.

    Other tensors are projected as they are. Whole numbers of 8 bits count from 0 to 1. A random
    projection keeps distances in the mean (Johnson and Lindenstrauss 1984), so near copies stay
    near; classes are told apart only as far as their pixels are.
    """

    def __init__(self, dim: int = 128) -> None:
        require_whole("dim", dim, 1)
        self._dim = dim
        self._projections: dict[int, NDArray[np.float32]] = {}

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def version(self) -> str:
        return f"pixels-{SIDE}-{self._dim}-1"

    def __call__(self, items: Sequence[Item]) -> Vectors:
        """(n, dim). Raises UnreadableError for texts and for images that cannot be decoded."""
        main = np.zeros((len(items), self._dim), np.float32)
        details: dict[int, str] = {}
        alike: dict[object, list[int]] = {}
        for at, item in enumerate(items):
            held = item.tensor
            alike.setdefault(None if held is None else (held.shape, held.dtype.str), []).append(at)
        for kind, places in alike.items():
            part = [items[at] for at in places]
            try:
                main[places] = self.features(_read(part) if kind is None else _stacked(part))
            except UnreadableError as error:
                details.update({places[at]: why for at, why in error.details.items()})
        if details:
            raise UnreadableError(details)
        return Vectors(main=main)

    @torch.no_grad()
    def features(self, batch: Tensor) -> NDArray[np.float32]:
        """(n, dim) of a batch (n, C, H, W), (n, H, W) or (n, ...), at length 1."""
        values = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
        if values.ndim == 3 and min(values.shape[1:]) >= 8:
            values = values[:, None]
        if values.ndim == 4 and values.shape[1] in (1, 3):
            small = functional.adaptive_avg_pool2d(values, SIDE).expand(-1, 3, SIDE, SIDE)
            mean = small.mean((2, 3))
            pattern = (small - mean[:, :, None, None]).flatten(1) / (3**0.5 * SIDE)
            floor = torch.full((len(values), 1), _FLOOR)
            wide = torch.cat([pattern, _BRIGHTNESS * (mean - 0.5), floor], 1)
        else:
            wide = values.flatten(1)
        return unit(wide.numpy() @ self._projection(wide.shape[1]))[0]

    def _projection(self, width: int) -> NDArray[np.float32]:
        if width not in self._projections:
            self._projections[width] = projection(width, self._dim)
        return self._projections[width]


def _stacked(items: Sequence[Item]) -> Tensor:
    arrays: list[NDArray[Any]] = [item.tensor for item in items if item.tensor is not None]
    return torch.from_numpy(np.stack(arrays))


def _read(items: Sequence[Item]) -> Tensor:
    return torch.from_numpy(squares(pictures(items, near=SIDE), SIDE))
