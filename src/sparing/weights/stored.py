"""A mask in few bytes: packed bits, or Golomb-coded gaps where those are fewer.

A record is a header and a body. Header, little-endian, 16 bytes: format (1), how the body is
coded (0 bits, 1 gaps between kept entries, 2 gaps between dropped ones), Golomb's parameter m in
two bytes, and in four each CRC-32 of all else, number of entries, number of gaps.

The gaps g of n positions are split as g = q m + r (Golomb 1966) and lie in three packed streams,
each beginning on a byte, so that numpy codes and decodes them without a loop: the quotients in
unary (q ones and a zero), the upper bits of r in truncated binary (Gallager and van Voorhis 1975),
and its last bit for those r that have one.
"""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.errors import RequestError, RunError

FORMAT = 1
BITS, KEPT, DROPPED = range(3)
HEADER = struct.Struct("<BBHIII")
LARGEST = 2**32 - 1
"""Entries in one mask."""
MOST = 2**16 - 1
"""Golomb's parameter: of gaps that are longer on average the quotients pay a little more."""

Whole = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]


def encode(mask: Tensor) -> Tensor:
    """The record of a mask: bool of any shape -> (bytes,) uint8 on the CPU, the smallest of three.

    The shape is not part of it. Raises RequestError for another dtype, or over 2^32 - 1 entries.
    """
    if mask.dtype != torch.bool:
        raise RequestError(f"a mask is of torch.bool, got {mask.dtype}")
    if mask.numel() > LARGEST:
        raise RequestError(f"a mask has at most {LARGEST} entries, got {mask.numel()}")
    flags: Flags = mask.detach().cpu().contiguous().reshape(-1).numpy()
    choices = [(BITS, 0, 0, np.packbits(flags, bitorder="little"))]
    for code, wanted in ((KEPT, True), (DROPPED, False)):
        gaps = _gaps(np.flatnonzero(flags == wanted))
        # gaps need over a bit each: a mask of more is smaller in bits
        if 0 < gaps.size < flags.size:
            m = parameter(gaps.size, flags.size)
            choices.append((code, m, gaps.size, _coded(gaps, m)))
        elif gaps.size == 0:
            choices.append((code, 1, 0, np.zeros(0, dtype=np.uint8)))
    code, m, count, body = min(choices, key=lambda choice: choice[3].size)
    packed = HEADER.pack(FORMAT, code, m, 0, flags.size, count)
    check = zlib.crc32(body.tobytes(), zlib.crc32(packed))
    head = HEADER.pack(FORMAT, code, m, check, flags.size, count)
    return torch.from_numpy(np.concatenate((np.frombuffer(head, dtype=np.uint8), body)))


def decode(record: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The mask of a record: (bytes,) uint8 -> bool of that shape, on the CPU.

    Raises RunError for a record that is broken or of a newer format, RequestError for one that
    holds another number of entries than the shape.
    """
    if record.dtype != torch.uint8 or record.ndim != 1:
        raise RequestError(
            f"a stored mask is a vector of uint8, got {tuple(record.shape)} of {record.dtype}"
        )
    raw = record.detach().cpu().contiguous().numpy()
    if raw.size < HEADER.size:
        raise _broken(f"{raw.size} bytes are fewer than its header of {HEADER.size}")
    version, code, m, check, size, count = HEADER.unpack(raw[: HEADER.size].tobytes())
    if version != FORMAT:
        raise RunError(
            f"the stored mask is of format {version}, this version reads {FORMAT}; update sparing"
        )
    body = raw[HEADER.size :]
    head = HEADER.pack(version, code, m, 0, size, count)
    if zlib.crc32(body.tobytes(), zlib.crc32(head)) != check:
        raise _broken("its checksum does not match")
    if size != math.prod(shape):
        raise RequestError(f"the stored mask has {size} entries, the shape {tuple(shape)} another")
    if code == BITS:
        if body.size != -(-size // 8):
            raise _broken(f"{body.size} bytes do not hold {size} bits")
        flags = np.unpackbits(body, count=size, bitorder="little").astype(np.bool_)
    elif code in (KEPT, DROPPED) and m > 0 and count <= size:
        places = np.cumsum(_decoded(body, m, count) + 1) - 1
        if count and places[-1] >= size:
            raise _broken(f"a gap leads to entry {places[-1]} of {size}")
        flags = np.full(size, code == DROPPED, dtype=np.bool_)
        flags[places] = code == KEPT
    else:
        raise _broken(f"its header is impossible: code {code}, m {m}, {count} gaps")
    return torch.from_numpy(flags).reshape(shape)


def parameter(count: int, size: int) -> int:
    """Golomb's m for ``count`` of ``size`` entries at random: the best for geometric gaps.

    The least m with q^m + q^(m + 1) <= 1, where q is the share of the others (Gallager and van
    Voorhis 1975).
    """
    others = 1 - count / size
    if others <= 0:
        return 1
    return min(max(1, math.ceil(-math.log1p(others) / math.log(others))), MOST)


def _gaps(places: Whole) -> Whole:
    """How many entries lie between one and the one before: (n,) ascending -> (n,)."""
    gaps: Whole = np.diff(places, prepend=-1) - 1
    return gaps


def _coded(gaps: Whole, m: int) -> Bytes:
    quotients, rest = np.divmod(gaps, m)
    ends = np.cumsum(quotients + 1) - 1
    unary = np.ones(int(ends[-1]) + 1, dtype=np.uint8)
    unary[ends] = 0
    width, short = _truncated(m)
    long = rest >= short
    value = rest + np.where(long, short, 0)
    upper = np.where(long, value >> 1, value)
    bits = (upper[:, None] >> np.arange(width)) & 1 if width else np.zeros((0, 0), np.int64)
    streams = (unary, bits.reshape(-1), value[long] & 1)
    return np.concatenate([np.packbits(s.astype(np.uint8), bitorder="little") for s in streams])


def _decoded(body: Bytes, m: int, count: int) -> Whole:
    """The gaps of a body. Raises RunError if it is too short or too long for them."""
    if count == 0:
        if body.size:
            raise _broken("it has a body and no gaps")
        return np.zeros(0, dtype=np.int64)
    ends: Whole = np.flatnonzero(np.unpackbits(body, bitorder="little") == 0)[:count]
    if ends.size < count:
        raise _broken(f"it holds {ends.size} of {count} gaps")
    quotients = _gaps(ends)
    at = -(-(int(ends[-1]) + 1) // 8)
    width, short = _truncated(m)
    bits = _stream(body[at:], width * count).reshape(count, width).astype(np.int64)
    upper = (bits << np.arange(width)).sum(axis=1)
    at += -(-width * count // 8)
    long = upper >= short
    last = _stream(body[at:], int(long.sum()))
    if body.size != at + -(-last.size // 8):
        raise _broken(f"its body has {body.size} bytes instead of {at + -(-last.size // 8)}")
    rest: Whole = upper
    rest[long] = 2 * upper[long] + last - short
    if bool((rest >= m).any()):
        raise _broken(f"a remainder is above m = {m}")
    rest += quotients * m
    return rest


def _stream(body: Bytes, count: int) -> Bytes:
    if body.size < -(-count // 8):
        raise _broken(f"{body.size} bytes are left for {count} bits")
    return np.unpackbits(body[: -(-count // 8)], count=count, bitorder="little")


def _truncated(m: int) -> tuple[int, int]:
    """Bits of the upper part of a remainder below m, and how many remainders have no last bit."""
    bits = (m - 1).bit_length()
    return (bits - 1, (1 << bits) - m) if bits else (0, 1)


def _broken(why: str) -> RunError:
    return RunError(f"the stored mask is broken: {why}; get the file again from where it came")
