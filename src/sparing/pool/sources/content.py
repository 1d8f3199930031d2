"""The bytes of images and texts: what can be told of them without decoding them."""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import Final

from sparing.core.errors import RequestError
from sparing.pool.sources.reading import Reading, Unreadable

IMAGES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def image(data: bytes, reading: Reading) -> bytes:
    """The same bytes, of which the header is that of an image of not too many pixels.

    Only the header is looked at: a cut in the middle is found by whoever decodes it. Raises
    Unreadable, and RequestError where Pillow is missing.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise RequestError(
            f'images need the package "{error.name}", which is not installed; run: pip install '
            '"sparing[pool]"'
        ) from error
    if not data:
        raise Unreadable("the image is empty (0 bytes)")
    if len(data) > reading.bytes:
        raise Unreadable(f"the image has {len(data):,} bytes; at most {reading.bytes:,} are taken")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of too many pixels: that is judged below
            with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
                width, height = opened.size
    except Image.DecompressionBombError as error:
        raise Unreadable(f"the image is oversized ({error})") from None
    except Image.UnidentifiedImageError:
        raise Unreadable(f"no image that can be read; {', '.join(_FORMATS)} are") from None
    except Exception as error:  # readers of damaged headers raise whatever they stumble over
        raise Unreadable(
            f"no image that can be read: its header is damaged ({_short(error)})"
        ) from None
    if width * height > reading.pixels:
        raise Unreadable(
            f"the image is oversized: {width:,} x {height:,} pixels; at most {reading.pixels:,} "
            "are taken"
        )
    return data


def text(data: bytes, what: str = "caption") -> str:
    """The text, with the blanks around it cut off. Raises Unreadable where none is left."""
    try:
        found = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Unreadable(
            f"the {what} is not UTF-8: line {line}, byte {error.start + 1} is "
            f"0x{data[error.start]:02x}"
        ) from None
    return worded(found, what)


def worded(found: str, what: str = "caption") -> str:
    """The text, with the blanks around it cut off. Raises Unreadable where none is left."""
    found = found.strip()
    if not found:
        raise Unreadable(f"the {what} is empty")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise Unreadable(
            f"the {what} has half a surrogate pair at character {error.start + 1}"
        ) from None
    return found


def label(found: object, reading: Reading) -> int:
    """The class as a number from 0 on. Raises Unreadable for what names none."""
    if isinstance(found, str) and found.strip() in reading.classes:
        return reading.classes.index(found.strip())
    number: int | None = None
    if isinstance(found, int) and not isinstance(found, bool):
        number = found
    elif isinstance(found, float) and found.is_integer():
        number = int(found)
    elif isinstance(found, str):
        try:
            number = int(found)
        except ValueError:
            number = None
    if number is None:
        known = f"none of {', '.join(reading.classes[:8])}" if reading.classes else "no number"
        hint = "" if reading.classes else "; name the classes (--classes) where labels are words"
        raise Unreadable(f"the label {_short(found)!r} is {known}{hint}")
    if number < 0 or number >= 2**31 or (reading.classes and number >= len(reading.classes)):
        most = len(reading.classes) - 1 if reading.classes else 2**31 - 1
        raise Unreadable(f"the label {number} is not in 0 .. {most}")
    return number


def file_inside(root: Path, name: str, reading: Reading) -> bytes:
    """The bytes of a file below ``root``. Raises Unreadable for all else, links outside too."""
    path = root / name
    try:
        if os.path.isabs(name) or not path.resolve().is_relative_to(root.resolve()):
            raise Unreadable(f"{_short(name)} points outside {root.name or root}")
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise Unreadable(f"{_short(name)} is no file")
        if about.st_size > reading.bytes:
            raise Unreadable(
                f"{_short(name)} has {about.st_size:,} bytes; at most {reading.bytes:,} are taken"
            )
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        raise Unreadable(f"{_short(name)} cannot be read ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or _short(error)


def _short(value: object) -> str:
    shown = str(value).splitlines()
    first = shown[0] if shown else type(value).__name__
    return first if len(first) <= 120 else first[:117] + "..."
