"""Small sources for the tests: pictures, tars, and what reading them in pieces gives."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from sparing.pool.items import Drop, Item
from sparing.pool.sources import Source, open_source


def picture(number: int = 0, size: tuple[int, int] = (6, 5), form: str = "PNG") -> bytes:
    held = io.BytesIO()
    color = (number * 37 % 256, number * 91 % 256, number // 256 % 256)
    Image.new("RGB", size, color).save(held, form)
    return held.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + body + end


def tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as out:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def pairs(n: int) -> list[tuple[str, bytes]]:
    return [
        member
        for number in range(n)
        for member in (
            (f"{number:04d}.png", picture(number)),
            (f"{number:04d}.txt", f"picture {number}".encode()),
        )
    ]


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def everything(source: Source, size: int = 256) -> tuple[list[Item], list[Drop]]:
    items: list[Item] = []
    drops: list[Drop] = []
    for chunk in source.chunks(size=size):
        items += chunk.items
        drops += chunk.drops
    return items, drops


def restarted(path: Path, size: int, **options: Any) -> tuple[list[Item], list[Drop]]:
    """The same, where after each chunk another process would go on from its cursor."""
    items: list[Item] = []
    drops: list[Drop] = []
    cursor = None
    while True:
        source = open_source(path, **options)
        chunk = next(source.chunks(cursor, size), None)
        if chunk is None:
            return items, drops
        items += chunk.items
        drops += chunk.drops
        cursor = json.loads(json.dumps(chunk.cursor))


def only(path: Path, **options: Any) -> Drop:
    """The one drop of a source."""
    _, drops = everything(open_source(path, **options))
    assert len(drops) == 1, drops
    assert drops[0].reason == "unreadable"
    return drops[0]
