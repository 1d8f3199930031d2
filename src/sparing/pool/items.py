"""What arrives, and what became of it, as every part of the pool passes it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError

KINDS: Final = ("image", "text", "image-text", "tensor")
UNLABELLED: Final = -1
IMAGE_HASH: Final = "image_hash"
"""The column with perceptual hashes of images, 0 for none."""

REASONS: Final[tuple[str, ...]] = (
    "kept",
    "same content",  # the very same bytes are in the pool
    "near copy",  # another item stands for its group of near duplicates
    "misaligned",  # image and text do not belong together
    "label issue",  # confident learning finds another label likelier
    "outlier",  # far from everything
    "unreadable",  # a damaged, oversized or empty item; never stored
    "evicted",  # left by the budget of size
)
"""Why an item is in the pool's choice (0) or not; stored by its position here, so only append."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One item as it arrived.

    key: where in its source, "folder/a.png" or "part-3.tar:00012"; image: the file's bytes, never
    decoded; text: the caption or the text itself; tensor: a sample given as an array; label: a
    class, -1 without one.
    """

    key: str
    image: bytes | None = None
    text: str | None = None
    tensor: NDArray[np.generic] | None = None
    label: int = UNLABELLED

    @property
    def kind(self) -> str:
        """One of KINDS. Raises RequestError for an item without content."""
        if self.tensor is not None:
            return "tensor"
        if self.image is not None:
            return "image" if self.text is None else "image-text"
        if self.text is None:
            raise RequestError(f"{self.key}: an item needs an image, a text or a tensor")
        return "text"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """What an encoder makes of n items: rows of length 1, float32.

    main: (n, d), by which items are neighbours; second: (n, d) of the texts of image-text pairs,
    in the same space, else None.
    """

    main: NDArray[np.float32]
    second: NDArray[np.float32] | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """An item that was not kept: where it was, why (one of REASONS), and more in words."""

    key: str
    reason: str
    detail: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What became of a batch: ids (n,) int64, -1 where nothing was stored, and what was dropped."""

    ids: NDArray[np.int64]
    drops: Sequence[Drop] = field(default_factory=tuple)
