"""What rows have in common, whether of JSONL, Parquet or JSON members: columns by name."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from sparing.core.errors import RequestError, nearest
from sparing.pool.items import UNLABELLED, Drop, Item
from sparing.pool.sources import content
from sparing.pool.sources.reading import Reading, Unreadable

USUAL: Final[dict[str, tuple[str, ...]]] = {
    "image": ("image", "img", "image_path", "file_name", "jpg", "png"),
    "text": ("text", "caption", "txt", "sentence", "content"),
    "label": ("label", "labels", "cls", "class", "fine_label", "target"),
    "key": ("key", "__key__", "id"),
}


@final
@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns an item is made of; None where it has no such part."""

    image: str | None
    text: str | None
    label: str | None
    key: str | None

    @property
    def read(self) -> list[str]:
        """The columns that are read, each once."""
        given = (self.image, self.text, self.label, self.key)
        return list(dict.fromkeys(name for name in given if name is not None))


def columns(there: Collection[str], reading: Reading, where: str) -> Columns:
    """The columns by the options' names, or by usual ones.

    Raises RequestError for a name that is not ``there``, and where no content is found.
    """
    found: dict[str, str | None] = {}
    for part, usual in USUAL.items():
        name = getattr(reading, part)
        if name is not None and name not in there:
            raise RequestError(f'{where} has no column "{name}"; {nearest(name, there)}')
        found[part] = name or next((known for known in usual if known in there), None)
    wanted = reading.content.split("-") if reading.content != "auto" else []
    for part in wanted:
        if found[part] is None:
            raise RequestError(
                f"{where} has no column of {part}s by a usual name ({', '.join(USUAL[part])}); "
                f"name it with {part}=...; its columns: {', '.join(sorted(there)) or 'none'}"
            )
    if wanted:
        for part in ("image", "text"):
            found[part] = found[part] if part in wanted else None
    elif found["image"] is None and found["text"] is None:
        raise RequestError(
            f"{where} has no column of images or texts by a usual name "
            f"({', '.join(USUAL['image'] + USUAL['text'])}); name one with image=... or text=...; "
            f"its columns: {', '.join(sorted(there)) or 'none'}"
        )
    return Columns(**found)


def outcome(
    row: Mapping[str, Any], named: Columns, root: Path, reading: Reading, place: str
) -> Item | Drop:
    """The row's item, or why it is none; ``place`` is its key where no column gives one."""
    try:
        given = row.get(named.key) if named.key is not None else None
        key = place if given is None or given == "" else _key(given)
    except Unreadable as error:
        return Drop(key=place, reason="unreadable", detail=f"{place}: {error}")
    try:
        image = None if named.image is None else _image(row.get(named.image), root, reading)
        text = None if named.text is None else _text(row.get(named.text), reading)
        label = UNLABELLED
        if named.label is not None and row.get(named.label) is not None:
            label = content.label(row[named.label], reading)
        return Item(key=key, image=image, text=text, label=label)
    except Unreadable as error:
        return Drop(key=key, reason="unreadable", detail=f"{place}: {error}")


def _key(given: Any) -> str:
    if isinstance(given, bytes):
        return content.text(given, "key")
    if isinstance(given, str):
        return content.worded(given, "key")
    if isinstance(given, int):
        return str(given)
    raise Unreadable(f"the key is a {type(given).__name__}, no text or number")


def _text(given: Any, reading: Reading) -> str:
    if given is None:
        raise Unreadable("the caption is missing")
    if isinstance(given, list) and given:
        given = given[0]  # several captions of one image: the first, as datasets' cards say
    if isinstance(given, str | bytes) and len(given) > reading.bytes:
        raise Unreadable(
            f"the caption has {len(given):,} bytes; at most {reading.bytes:,} are taken"
        )
    if isinstance(given, bytes):
        return content.text(given)
    if not isinstance(given, str):
        raise Unreadable(f"the caption is a {type(given).__name__}, no text")
    return content.worded(given)


def _image(given: Any, root: Path, reading: Reading) -> bytes:
    """The image of a cell: bytes, a path below ``root``, a data URI, or {"bytes", "path"}."""
    if isinstance(given, Mapping):
        held = given.get("bytes")
        given = given.get("path") if held is None else held
        if isinstance(given, str) and held is not None:
            return content.image(_decoded(given), reading)
    if given is None or given in ("", b""):
        raise Unreadable("the image is missing")
    if isinstance(given, bytes):
        return content.image(given, reading)
    if not isinstance(given, str):
        raise Unreadable(f"the image is a {type(given).__name__}, no bytes and no path")
    if given.startswith("data:"):
        _, comma, held = given.partition(";base64,")
        if not comma:
            raise Unreadable("the image is a data URI without base64")
        return content.image(_decoded(held), reading)
    return content.image(content.file_inside(root, given, reading), reading)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unreadable(f"the image's base64 is damaged ({error})") from None
