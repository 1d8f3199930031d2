"""An item as bytes: what the payload shards hold, and what its content hash is taken of.

A record is ``crc32 | id | length of key | length of content | key | content``; the crc covers all
that follows it. The content is the item without its key, so that the same bytes from two places
have one hash; its label belongs to it.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError, RunError
from sparing.pool.items import KINDS, Item

_HEAD: Final = struct.Struct("<IqIQ")
_BODY: Final = struct.Struct("<qIQ")  # what follows the checksum
_CONTENT: Final = struct.Struct("<BqQQHQ")  # which parts, label, bytes of image, text, form, tensor
_IMAGE, _TEXT, _TENSOR = 1, 2, 4
_BY_PARTS = ("text", "image", "text", "image-text", "tensor", "tensor", "tensor", "tensor")
_KINDS: Final = np.array([KINDS.index(kind) for kind in _BY_PARTS], np.int8)
"""The kind by which parts an item has."""
LONGEST: Final = (1 << 31) - 1


class Encoded(NamedTuple):
    """A batch as bytes: keys and contents of n items, and (n, 2) uint64 of 128 bits of hash."""

    keys: list[bytes]
    contents: list[bytes]
    hashes: NDArray[np.uint64]
    named: NDArray[np.uint64]
    """(n,) hashes of source and key together."""
    kinds: NDArray[np.int8]
    """(n,) kinds, as positions in KINDS."""


def encode(items: Sequence[Item], source: str) -> Encoded:
    """Raises RequestError for an item without content, too long, or an array of objects."""
    prefix = source.encode("utf-8", "surrogatepass") + b"\0"
    keys = [item.key.encode("utf-8", "surrogatepass") for item in items]
    contents, found = _contents(items)
    for item, key, content in zip(items, keys, contents, strict=True):
        if len(content) + len(key) > LONGEST - _HEAD.size:
            raise RequestError(f"{item.key}: an item of {len(content)} bytes; at most {LONGEST}")
    hashes = np.frombuffer(b"".join(map(_hash, contents)), "<u8").reshape(-1, 2)
    named = b"".join([hashlib.blake2b(prefix + key, digest_size=8).digest() for key in keys])
    kinds = _KINDS[np.array(found, np.int64)]
    return Encoded(keys, contents, hashes, np.frombuffer(named, "<u8"), kinds)


def content_hashes(items: Sequence[Item]) -> list[bytes]:
    """Of each 16 bytes by which the store tells items apart: blake2b of all but the key."""
    return list(map(_hash, _contents(items)[0]))


def content_hash(item: Item) -> bytes:
    """``content_hashes`` of one."""
    return content_hashes([item])[0]


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def record(number: int, key: bytes, content: bytes) -> tuple[bytes, bytes, bytes]:
    """The bytes of one item with its id, in pieces."""
    head = _BODY.pack(number, len(key), len(content)) + key
    crc = zlib.crc32(content, zlib.crc32(head))
    return crc.to_bytes(4, "little"), head, content


def sizes(keys: Sequence[bytes], contents: Sequence[bytes]) -> NDArray[np.int64]:
    """How many bytes each ``record`` has: (n,)."""
    n = len(keys)
    out = np.fromiter(map(len, keys), np.int64, n)
    out += np.fromiter(map(len, contents), np.int64, n)
    return out + _HEAD.size


def decode(data: bytes, number: int) -> Item:
    """The item of a record. Raises RunError if it is damaged or not that of id ``number``."""
    view = memoryview(data)
    if len(data) < _HEAD.size or zlib.crc32(view[4:]) != int.from_bytes(data[:4], "little"):
        raise RunError(f"item {number} does not match its checksum")
    _, found, key_size, size = _HEAD.unpack_from(data)
    if found != number or _HEAD.size + key_size + size != len(data):
        raise RunError(f"item {number} is not where the catalogue says; item {found} is")
    begin = _HEAD.size + key_size
    key = data[_HEAD.size : begin].decode("utf-8", "surrogatepass")
    parts, label, image_size, text_size, form_size, tensor_size = _CONTENT.unpack_from(data, begin)
    cursor = begin + _CONTENT.size
    pieces = []
    for length in (image_size, text_size, form_size, tensor_size):
        pieces.append(view[cursor : cursor + length])
        cursor += length
    image, text, form, tensor = pieces
    return Item(
        key=key,
        image=bytes(image) if parts & _IMAGE else None,
        text=bytes(text).decode("utf-8", "surrogatepass") if parts & _TEXT else None,
        tensor=_array(bytes(form), tensor) if parts & _TENSOR else None,
        label=label,
    )


def _contents(items: Sequence[Item]) -> tuple[list[bytes], list[int]]:
    """Items' bytes without their keys, and which parts each has."""
    forms: dict[Any, tuple[np.dtype[Any], bytes]] = {}
    contents, found = [], []
    for item in items:
        parts = 0
        image = text = form = tensor = b""
        if item.image is not None:
            parts, image = parts | _IMAGE, bytes(item.image)
        if item.text is not None:
            parts, text = parts | _TEXT, item.text.encode("utf-8", "surrogatepass")
        if item.tensor is not None:
            parts |= _TENSOR
            array = np.asarray(item.tensor)
            like = array.dtype, array.shape
            if like not in forms:
                forms[like] = _form(item.key, array)
            dtype, form = forms[like]
            tensor = (array if array.dtype == dtype else array.astype(dtype)).tobytes()
        if not parts:
            raise RequestError(f"{item.key}: an item needs an image, a text or a tensor")
        label = int(item.label)
        if not -(1 << 63) <= label < 1 << 63:
            raise RequestError(f"{item.key}: a label is a whole number of 64 bits, got {label}")
        head = _CONTENT.pack(parts, label, len(image), len(text), len(form), len(tensor))
        contents.append(b"".join((head, image, text, form, tensor)))
        found.append(parts)
    return contents, found


def _form(key: str, array: NDArray[np.generic]) -> tuple[np.dtype[Any], bytes]:
    """The type in which an array is stored, and what tells of it and of the array's shape."""
    if array.dtype.kind not in "biufc":
        raise RequestError(f"{key}: a tensor holds numbers, got an array of {array.dtype}")
    dtype = array.dtype.newbyteorder("<")
    return dtype, dtype.str.encode() + b"\0" + np.asarray(array.shape, "<i8").tobytes()


def _array(form: bytes, data: memoryview) -> NDArray[np.generic]:
    name, _, shape = form.partition(b"\0")
    flat: NDArray[np.generic] = np.frombuffer(bytes(data), np.dtype(name.decode()))
    return flat.reshape(np.frombuffer(shape, "<i8"))
