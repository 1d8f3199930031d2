"""Images as PNG in a data URI, without a library: a page that holds them needs nothing else."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from torch import Tensor


def png(image: Tensor) -> bytes:
    """Image (H, W, 1) or (H, W, 3) uint8 as a PNG file (ISO/IEC 15948), grey or colour."""
    height, width, channels = image.shape
    lines = np.zeros((height, 1 + width * channels), dtype=np.uint8)  # filter 0: none
    lines[:, 1:] = image.reshape(height, width * channels).numpy()
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def data_uri(image: Tensor) -> str:
    """The image as the address that an ``img`` element takes."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")
