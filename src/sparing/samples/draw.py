"""Exact random subsets and uniform shuffles of very many ids, block by block.

A block fits into a processor's cache and no list of all ids is ever made: beside the mask that is
given and the int32 ids that come out, memory stays constant.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.core.select import rounded as rounded

Ids = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Random = np.random.Generator

BLOCK = 1 << 20
"""Samples that are looked at together."""
BUCKET = 1 << 18
"""Ids that are shuffled together, about, where there are more than ``WHOLE``."""
WHOLE = 1 << 22
LEFT_OUT = 128
"""A bit of a sample's code while a draw is not yet exact; codes are below it."""
LARGEST = 2**31 - 1


def generator(seed: int, epoch: int) -> Random:
    """The generator of an epoch's plan: the same on every rank, and at every resume."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, epoch))))


def thin_(code: Bytes, group: int, keep: int, random: Random) -> None:
    """Leave exactly ``keep`` of the samples whose code is ``group``; the others get the code 0.

    code: (N,) uint8, changed in place. Every subset of that size is equally likely: an independent
    draw for each sample leaves about that many, and given its size such a subset is uniform; then
    the few that are missing or too many are drawn among those left out or kept.
    Raises RequestError if there are fewer than ``keep``.
    """
    blocks = range(0, code.size, BLOCK)
    have = [int(np.count_nonzero(code[at : at + BLOCK] == group)) for at in blocks]
    total = sum(have)
    if not 0 <= keep <= total:
        raise RequestError(f"cannot keep {keep} of {total} samples")
    if keep == total:
        return
    limit = min(round(65536 * keep / total), 65535)  # 16 random bits decide; the rest is exact
    out = group | LEFT_OUT
    kept = []
    for at in blocks:
        part = code[at : at + BLOCK]
        dropped = (part == group) & (_bits(random, part.size) >= limit)
        part |= dropped.view(np.uint8) << np.uint8(7)
        kept.append(int(np.count_nonzero(part == group)))
    missing = keep - sum(kept)
    if missing > 0:
        left = [h - k for h, k in zip(have, kept, strict=True)]
        _recode_(code, out, group, left, missing, random)
    elif missing < 0:
        _recode_(code, group, out, kept, -missing, random)
    for at in blocks:
        part = code[at : at + BLOCK]
        part *= part < LEFT_OUT


def _bits(random: Random, count: int) -> NDArray[np.uint16]:
    words: NDArray[np.uint64] = random.integers(
        0, 2**64 - 1, size=-(-count // 4), dtype=np.uint64, endpoint=True
    )
    return words.view(np.uint16)[:count]


def _recode_(code: Bytes, old: int, new: int, have: list[int], count: int, random: Random) -> None:
    """Give ``count`` of the samples with code ``old``, so many in each block, the code ``new``."""
    ranks = np.sort(random.choice(sum(have), count, replace=False, shuffle=False))
    first = 0
    for number, here in enumerate(have):
        low, high = np.searchsorted(ranks, (first, first + here))
        if high > low:
            part = code[number * BLOCK : (number + 1) * BLOCK]
            part[np.flatnonzero(part == old)[ranks[low:high] - first]] = new
        first += here


def shuffled(times: NDArray[Any], random: Random) -> Ids:
    """Each id so many times, in uniformly random order: (N,) counts or mask -> (n,) int32.

    Every order is equally likely (Rao 1961, Sandelius 1962: deal to buckets at random, then
    shuffle each bucket), and both passes stay within blocks of memory that a cache holds.
    Raises RequestError for more than 2^31 - 1 samples.
    """
    if times.size > LARGEST:
        raise RequestError(
            f"a plan holds at most {LARGEST} samples, got {times.size}; split the data set"
        )
    repeats = times.dtype.kind in "iu"
    sizes = [_size(times[at : at + BLOCK], repeats) for at in range(0, times.size, BLOCK)]
    total = sum(sizes)
    out = np.empty(total, dtype=np.int32)
    buckets = min(256, 1 << (total // BUCKET).bit_length())
    if total <= WHOLE:
        at = 0
        for number, size in enumerate(sizes):
            out[at : at + size] = _members(times, number, repeats)
            at += size
        _shuffle_(out, random)
        return out
    # the dealing is drawn twice from one state: first to count, then to place
    state = random.bit_generator.state
    counts = np.zeros(buckets, dtype=np.int64)
    for size in sizes:
        counts += np.diff(_cuts(np.sort(_deal(random, size, buckets), kind="stable"), buckets))
    random.bit_generator.state = state
    ends = np.cumsum(counts)
    place = ends - counts
    for number, size in enumerate(sizes):
        bucket = _deal(random, size, buckets)
        order = np.argsort(bucket, kind="stable")
        ids = _members(times, number, repeats)[order]
        cuts = _cuts(bucket[order], buckets).tolist()
        for which in range(buckets):
            low, high = cuts[which], cuts[which + 1]
            out[place[which] : place[which] + high - low] = ids[low:high]
            place[which] += high - low
    for low, high in zip(ends - counts, ends, strict=True):
        _shuffle_(out[low:high], random)
    return out


def _size(times: NDArray[Any], repeats: bool) -> int:
    return int(times.sum(dtype=np.int64)) if repeats else int(np.count_nonzero(times))


def _members(times: NDArray[Any], number: int, repeats: bool) -> NDArray[np.int64]:
    """The ids of a block, each as often as it is to come."""
    part = times[number * BLOCK : (number + 1) * BLOCK]
    found = np.flatnonzero(part)
    if repeats:
        found = np.repeat(found, part[found])
    return found + number * BLOCK


def _deal(random: Random, count: int, buckets: int) -> Bytes:
    words: NDArray[np.uint64] = random.integers(
        0, 2**64 - 1, size=-(-count // 8), dtype=np.uint64, endpoint=True
    )
    return words.view(np.uint8)[:count] & np.uint8(buckets - 1)


def _cuts(dealt: Bytes, buckets: int) -> NDArray[np.int64]:
    """Where each bucket begins among sorted ones, and the end: (buckets + 1,)."""
    inner = np.searchsorted(dealt, np.arange(1, buckets, dtype=np.uint8))
    return np.concatenate(([0], inner, [dealt.size]))


def _shuffle_(ids: Ids, random: Random) -> None:
    wide = ids.astype(np.intp)  # numpy shuffles words of this size twice as fast as others
    random.shuffle(wide)
    ids[:] = wide
