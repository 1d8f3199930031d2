"""Image files become arrays, safely: what is too large, cut or strange is told, never decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.encoders import UnreadableError
from sparing.pool.items import Item

MAX_PIXELS: Final = 64_000_000
"""Of one image; a decoded pixel takes three bytes or more."""
MAX_BYTES: Final = 128 << 20
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Read by Pillow itself; others, EPS for one, would start a program of their own."""


class ImageError(RequestError):
    """An image that cannot be used; its text is the drop's detail."""


def picture(data: bytes, *, near: int | None = None, max_pixels: int = MAX_PIXELS) -> Any:
    """The image as a ``PIL.Image`` in RGB, turned as its EXIF says, the first of several frames.

    near: a side's length that suffices; a JPEG is then decoded at a lower resolution, at least
    twice this. Transparent parts become white. Raises ImageError that says what is wrong: damaged,
    cut off, more than ``max_pixels`` (looked up in the header, before anything is decoded), an
    unknown format, or pixels that are no colours.
    """
    image_module, ops = pillow()
    if len(data) > MAX_BYTES:
        raise ImageError(f"a file of {len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, say
            # Pillow's own limit is a warning first, and another program may have raised it
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            with image_module.open(io.BytesIO(data), formats=FORMATS) as opened:
                _require_size(opened.size, max_pixels)
                if near is not None:
                    opened.draft("RGB", (2 * near, 2 * near))
                opened.load()
                return _coloured(ops.exif_transpose(opened), image_module)
    except ImageError:
        raise
    except (image_module.DecompressionBombWarning, image_module.DecompressionBombError) as error:
        raise ImageError(f"too many pixels ({error})") from error
    except image_module.UnidentifiedImageError as error:
        raise ImageError("no image in a known format, or damaged at its start") from error
    except MemoryError as error:
        raise ImageError("too large for the memory") from error
    except Exception as error:
        # decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"damaged or cut off ({type(error).__name__}: {error})") from error


def pictures(items: Sequence[Item], *, near: int | None = None) -> list[Any]:
    """The items' images in RGB. Raises UnreadableError with the reason for each that is none."""
    found: list[Any] = []
    details: dict[int, str] = {}
    for at, item in enumerate(items):
        try:
            if item.image is None:
                raise ImageError(f"no image in {item.key}; this encoder reads images")
            found.append(picture(item.image, near=near))
        except ImageError as error:
            details[at] = str(error)
    if details:
        raise UnreadableError(details)
    return found


def squares(images: Sequence[Any], side: int) -> NDArray[np.uint8]:
    """(n, 3, side, side): each image scaled as a whole, not keeping its ratio of sides."""
    image_module, _ = pillow()
    made = np.empty((len(images), side, side, 3), np.uint8)
    for at, image in enumerate(images):
        made[at] = np.asarray(image.resize((side, side), image_module.Resampling.BOX))
    return np.ascontiguousarray(made.transpose(0, 3, 1, 2))


def _require_size(size: tuple[int, int], max_pixels: int) -> None:
    wide, high = size
    if wide * high > max_pixels:
        raise ImageError(f"{wide} x {high} pixels; at most {max_pixels} are decoded")
    if wide < 1 or high < 1:
        raise ImageError(f"{wide} x {high} pixels: empty")


def _coloured(image: Any, image_module: Any) -> Any:
    """In RGB; 16 bits a channel are scaled, which Pillow's own conversion cuts off at 255."""
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ImageError(f"pixels of mode {image.mode} outside 0..65535 are no grey values")
        return image_module.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("pixels are floating-point numbers (mode F) of unknown range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        clear = image.convert("RGBA")
        ground = image_module.new("RGBA", clear.size, (255, 255, 255, 255))
        return image_module.alpha_composite(ground, clear).convert("RGB")
    return image.convert("RGB")


def pillow() -> tuple[Any, Any]:
    """PIL.Image and PIL.ImageOps. Raises RequestError where Pillow is not installed."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise RequestError(
            'reading images needs the package "pillow", which is not installed; '
            'run: pip install "sparing[pool]"'
        ) from error
    return Image, ImageOps
