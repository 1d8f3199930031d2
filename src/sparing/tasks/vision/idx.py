"""The files of Fashion-MNIST: IDX, plain or compressed by gzip or xz, checked by their hash."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import struct
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError

SHA256: Final = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Of the four original files, uncompressed."""
STEMS: Final = tuple(SHA256)
_OPENERS: Final[dict[str, Any]] = {".gz": gzip.decompress, ".xz": lzma.decompress, "": bytes}


def find(folder: Path, stem: str) -> Path | None:
    """The file of that name in ``folder``, compressed or not."""
    for suffix in _OPENERS:
        if (file := folder / f"{stem}{suffix}").is_file():
            return file
    return None


def read(folder: Path, stem: str, *, checked: bool) -> NDArray[np.uint8]:
    """The array of an IDX file of bytes, in its own shape; ``checked`` compares ``SHA256``.

    Raises RequestError for a missing, damaged or different file.
    """
    file = find(folder, stem)
    if file is None:
        raise RequestError(f"{folder} has no {stem}.gz; put it there, or delete the directory")
    try:
        content = _OPENERS[file.suffix](file.read_bytes())
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise RequestError(f"{file} cannot be read ({error}); delete it") from error
    if checked and hashlib.sha256(content).hexdigest() != SHA256[stem]:
        raise RequestError(
            f"{file} is not the original: its SHA-256 is another than that of Fashion-MNIST; "
            "delete it"
        )
    return parse(content, str(file))


def parse(content: bytes, name: str) -> NDArray[np.uint8]:
    """IDX of unsigned bytes: two zeros, 8, the number of axes, their sizes, then the values."""
    if len(content) >= 4 and content[:3] == b"\0\0\x08" and len(content) >= 4 + 4 * content[3]:
        axes = content[3]
        shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
        if values.size == math.prod(shape):
            return values.reshape(shape).copy()
    raise RequestError(f"{name} is not an IDX file of bytes, or is cut short; delete it")
