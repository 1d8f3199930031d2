"""Perceptual hashes of images, and pairs of images whose hashes hardly differ."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.pool.copies.groups import Ids
from sparing.pool.encoders.images import FORMATS, ImageError, picture, pillow
from sparing.pool.items import Item

Marks = NDArray[np.uint64]
_SIDE: Final = 32
_FLAT: Final = 2.0
"""Grey levels of standard deviation under which an image has no pattern to hash."""
_MOST: Final = 7
_BLOCK: Final = 1 << 22


def marks(items: Sequence[Item]) -> Marks:
    """(n,) imagehash's phash, 64 bits, of images and of tensors that are images; 0 for none.

    No hash have texts, images that cannot be decoded, and those of nearly one colour: their hash is
    that of noise, and all of them would be copies of each other, or none.
    """
    try:
        import imagehash
    except ModuleNotFoundError as error:
        raise RequestError(
            'perceptual hashes need the package "imagehash", which is not installed; '
            'run: pip install "sparing[pool]"'
        ) from error
    found = np.zeros(len(items), np.uint64)
    for at, item in enumerate(items):
        image = _image(item)
        if image is None:
            continue
        small = image.convert("L").resize((_SIDE, _SIDE))
        if float(np.asarray(small, np.float32).std()) >= _FLAT:
            bits = imagehash.phash(image).hash.ravel()
            found[at] = np.packbits(bits).view(">u8")[0]
    return found


def alike(found: Marks, bits: int) -> tuple[Ids, Ids]:
    """Positions of all pairs of hashes (n,) that differ by at most ``bits`` of 64; 0 is none.

    Of bits + 1 parts of both hashes one must be equal, so only those are compared (Manku, Jain,
    Sarma 2007). Equal hashes are paired with the first of their kind only: a chain that keeps a
    mass of copies connected.
    """
    require_whole("bits", bits, 0)
    if bits > _MOST:
        raise RequestError(
            f"bits must be at most {_MOST}, got {bits}: with more, too many pairs share a part"
        )
    held = np.flatnonzero(found)
    values, first, member = np.unique(found[held], return_index=True, return_inverse=True)
    same = held[first[member]] != held
    one, two = [held[first[member]][same]], [held[same]]
    edges = np.linspace(0, 64, bits + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        part = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        ordered = part[order]
        # the places after each one whose part is equal
        stop = np.searchsorted(ordered, ordered, "right")
        count = stop - np.arange(len(ordered)) - 1
        for rows in _blocks(count):
            repeat = count[rows]
            here = np.repeat(np.arange(rows.start, rows.stop), repeat)
            step = np.arange(len(here)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
            there = here + step + 1
            a, b = order[here], order[there]
            near = np.bitwise_count(values[a] ^ values[b]) <= bits
            one.append(held[first[a[near]]])
            two.append(held[first[b[near]]])
    left, right = np.concatenate(one), np.concatenate(two)
    both = np.unique(np.stack([np.minimum(left, right), np.maximum(left, right)], 1), axis=0)
    return both[:, 0], both[:, 1]


def quality(items: Sequence[Item]) -> NDArray[np.float64]:
    """(n,) which copy to prefer: more pixels, then longer texts; the higher the better.

    Only headers of images are read; one that cannot be read counts 0 pixels.
    """
    made = np.zeros(len(items))
    for at, item in enumerate(items):
        if item.image is not None:
            made[at] = _pixels(item.image)
        elif item.tensor is not None:
            made[at] = item.tensor.size
        if item.text is not None:
            length = float(min(len(item.text), 999_999))
            made[at] += length if item.kind == "text" else length * 1e-6
    return made


def _pixels(data: bytes) -> float:
    module, _ = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with module.open(io.BytesIO(data), formats=FORMATS) as opened:
                return float(opened.width * opened.height)
    except Exception:  # a damaged file raises nearly anything
        return 0.0


def _blocks(count: Ids) -> list[slice]:
    """Rows in runs of about _BLOCK pairs."""
    total = np.cumsum(count)
    if not len(total) or not total[-1]:
        return []
    cuts = np.searchsorted(total, np.arange(_BLOCK, total[-1], _BLOCK))
    edges = np.unique(np.concatenate([[0], cuts + 1, [len(count)]])).clip(0, len(count))
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def _image(item: Item) -> Any:
    """In RGB, or None for an item that is no image."""
    if item.tensor is None:
        try:
            return None if item.image is None else picture(item.image, near=64)
        except ImageError:
            return None
    values = item.tensor if item.tensor.ndim == 3 else item.tensor[None]
    if values.ndim != 3 or values.shape[0] not in (1, 3) or min(values.shape[1:]) < 8:
        return None
    if values.dtype != np.uint8:
        wide = values.astype(np.float32)
        low, high = float(wide.min()), float(wide.max())
        if not np.isfinite(high - low):
            return None
        # normalised images have another range; the hash knows order only
        scaled = wide if low >= 0 and high <= 1 else (wide - low) / max(high - low, 1e-12)
        values = (scaled * 255).round().astype(np.uint8)
    return pillow()[0].fromarray(values.transpose(1, 2, 0).repeat(3 // values.shape[0], 2))
