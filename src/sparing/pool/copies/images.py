"""Perceptual hashes of image files: alike for the same picture in another size or compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.encoders.images import ImageError, picture, pillow
from sparing.pool.items import Item

Marks = NDArray[np.uint64]
LEAST: Final = 32
"""Pixels of the shorter side under which different images of one kind have nearly equal hashes."""
_SIDE: Final = 32
_FLAT: Final = 2.0
"""Grey levels of standard deviation under which an image has no pattern to hash."""


def marks(items: Sequence[Item]) -> Marks:
    """(n,) imagehash's phash, 64 bits, of the items' image files; 0 for none.

    No hash have items without a file, images that cannot be decoded, those smaller than LEAST, and
    those of nearly one colour: their hash is that of noise, and all of them would be copies of each
    other, or none.
    """
    found = np.zeros(len(items), np.uint64)
    if all(item.image is None for item in items):
        return found
    try:
        import imagehash
    except ModuleNotFoundError as error:
        raise RequestError(
            'perceptual hashes need the package "imagehash", which is not installed; '
            'run: pip install "sparing[pool]", or do without: Cleaning(image_hash=-1)'
        ) from error
    lanczos = pillow()[0].Resampling.LANCZOS
    for at, item in enumerate(items):
        if item.image is None:
            continue
        try:
            image = picture(item.image, near=_SIDE)
        except ImageError:
            continue
        if min(image.size) < LEAST:
            continue
        # the size and filter of phash, which then has nothing left to scale
        wide = image.convert("L").resize((_SIDE, _SIDE), lanczos, reducing_gap=3.0)
        if float(np.asarray(wide, np.float32).std()) >= _FLAT:
            found[at] = np.packbits(imagehash.phash(wide).hash.ravel()).view(">u8")[0]
    return found
