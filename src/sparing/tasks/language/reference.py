"""What simple known methods reach on the same held-out text: a 5-gram model and xz.

They learn from as much text as the network sees in one epoch of the default order: of every
domain as many bytes as the smallest domain has of training text, in pieces of 256
bytes that are spread evenly over all of it.

``5-gram``
    One modified Kneser-Ney model over all domains' text, as the network is one for all. It is
    scored on exactly the bytes on which ``Language.evaluate`` scores the network, and may look at
    the text before a window, which the network may not.
``5-gram per domain``
    The same, one model for each domain: it is told what the network has to find out.
``xz``
    The bits that LZMA (preset 9, extreme; without container headers) needs for the domain's whole
    held-out text after the domain's training text, per byte: the size of both less that of the
    first. A compressor adapts as it goes, so its text is not cut into windows.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sparing.tasks import figures
from sparing.tasks.figures import Scores
from sparing.tasks.language.corpus import Split
from sparing.tasks.language.ngram import Integers, NGram

_PROTOCOL = 1  # raise it whenever the figures would change for the same data
_ORDER = 5
_PIECE = 256


def references(
    texts: Mapping[str, Split], starts: Mapping[str, Integers], length: int, fingerprint: str
) -> Scores:
    """Bits per byte by method, then by domain and ``"mean"``.

    ``starts``: where each domain's evaluated windows of ``length`` predicted bytes begin in its
    held-out text. Takes seconds; kept in the user's cache under a hash of ``fingerprint`` and
    windows, where that can be written.
    """
    key = _key(starts, length, fingerprint)
    wanted = set(texts) | {"mean"}
    return figures.kept("language", key, wanted, lambda: measure(texts, starts, length))


def measure(texts: Mapping[str, Split], starts: Mapping[str, Integers], length: int) -> Scores:
    """As ``references``, without the cache."""
    least = min(len(split.train) for split in texts.values())
    learnt = {name: learnt_from(len(split.train), least) for name, split in texts.items()}
    arrays = {name: np.frombuffer(split.train, np.uint8) for name, split in texts.items()}
    # LZMA works outside the interpreter's lock: the compressor runs beside the counting.
    with ThreadPoolExecutor(max_workers=1) as pool:
        xz = {
            name: pool.submit(xz_bits, arrays[name][learnt[name]].tobytes(), texts[name].held_out)
            for name in texts
        }
        together = NGram(_ORDER, [(arrays[name], learnt[name]) for name in texts])
        joint: dict[str, float] = {}
        alone: dict[str, float] = {}
        for name, split in texts.items():
            held_out = np.frombuffer(split.held_out, np.uint8)
            scored = (starts[name][:, None] + np.arange(1, length + 1)).reshape(-1)
            joint[name] = float(together.bits(held_out, scored).mean())
            own = NGram(_ORDER, [(arrays[name], learnt[name])])
            alone[name] = float(own.bits(held_out, scored).mean())
        table = {
            f"{_ORDER}-gram": joint,
            f"{_ORDER}-gram per domain": alone,
            "xz": {name: future.result() for name, future in xz.items()},
        }
    return {
        method: {**scores, "mean": sum(scores.values()) / len(scores)}
        for method, scores in table.items()
    }


def learnt_from(size: int, least: int) -> Integers:
    """Sorted positions in ``size`` bytes: about ``least`` of them, in evenly spread pieces."""
    piece = min(_PIECE, least)
    pieces, take = size // piece, least // piece
    chosen = np.arange(take, dtype=np.int64) * pieces // take
    return (chosen[:, None] * piece + np.arange(piece)).reshape(-1)


def xz_bits(train: bytes, held_out: bytes) -> float:
    """Bits per held-out byte that LZMA needs beyond what it needs for ``train``."""
    return 8 * (_packed(train + held_out) - _packed(train)) / len(held_out)


def _packed(text: bytes) -> int:
    method: dict[str, Any] = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=[method]))


def _key(starts: Mapping[str, Integers], length: int, fingerprint: str) -> str:
    digest = hashlib.sha256(f"{_PROTOCOL}/{_ORDER}/{length}/{fingerprint}".encode())
    for name in sorted(starts):
        digest.update(name.encode() + starts[name].astype("<i8").tobytes())
    return digest.hexdigest()[:32]
