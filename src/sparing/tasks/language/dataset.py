"""Windows of bytes: fixed samples to train on, a balanced order, fixed windows to evaluate on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from sparing.core.errors import RequestError


def _tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def _seeded(*parts: int | str) -> torch.Generator:
    """A generator whose seed is a hash of ``parts``, so that streams are independent."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


def window_starts(size: int, length: int) -> Tensor:
    """Starts of the windows of ``length + 1`` bytes in ``size`` bytes, int64, (n,).

    Windows lie ``length`` bytes apart: a window's last label is the next one's first input, so
    every byte but the first is predicted exactly once.
    """
    return torch.arange(0, max(0, size - length), length)


@final
class Windows:
    """All domains' training windows, numbered domain by domain; bytes stay uint8 in memory.

    ``texts``: training bytes by domain. ``length``: bytes predicted per window, S. ``most``: so
    many windows of each domain at most, spread evenly over its text; None for all.
    Raises RequestError for an empty domain and for one shorter than one window.
    """

    def __init__(self, texts: Mapping[str, bytes], length: int, most: int | None = None) -> None:
        starts: list[Tensor] = []
        base = 0
        for name, text in texts.items():
            require_window(name, "training", len(text), length)
            here = window_starts(len(text), length)
            if most is not None and most < len(here):
                here = here[torch.arange(most) * len(here) // most]
            starts.append(base + here)
            base += len(text)
        self.domains = tuple(texts)
        self.length = length
        self.counts = tuple(len(s) for s in starts)
        self._text = _tensor(b"".join(texts.values()))
        self._starts = torch.cat(starts)
        self._first = torch.tensor((0, *self.counts)).cumsum(0)  # (D + 1,)
        self._span = torch.arange(length + 1)

    def __len__(self) -> int:
        return int(self._starts.numel())

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """``index`` (B,) int64 -> ``input_ids`` and ``labels``, each (B, S) int64.

        ``labels[:, t]`` is the byte that follows ``input_ids[:, t]``.
        """
        window = self._text[self._starts[index].unsqueeze(1) + self._span].long()  # (B, S + 1)
        return {
            "input_ids": window[:, :-1].contiguous(),
            "labels": window[:, 1:].contiguous(),
        }

    def domain_of(self, index: Tensor) -> Tensor:
        """(B,) int64 -> (B,) int64, positions in ``domains``."""
        return torch.bucketize(index, self._first[1:], right=True)

    def order(self, epoch: int, seed: int) -> Tensor:
        """The windows of an epoch, int64, (D * m,), m being the size of the smallest domain.

        Every domain gives m windows. A larger one goes through a permutation of all its windows
        over several epochs and then through a fresh one, so none comes again before all came.
        Each D windows in a row hold one of every domain, so that batches are balanced too.
        A function of ``epoch`` and ``seed`` alone.
        """
        take = min(self.counts)
        rows = []
        for domain, (name, count) in enumerate(zip(self.domains, self.counts, strict=True)):
            position = torch.arange(epoch * take, (epoch + 1) * take)
            rows.append(self._first[domain] + _through(position, count, seed, name))
        mixed = torch.stack(rows, dim=1)  # (m, D)
        shuffle = torch.rand(mixed.shape, generator=_seeded(seed, "epoch", epoch)).argsort(dim=1)
        return mixed.gather(1, shuffle).reshape(-1)


def _through(position: Tensor, count: int, seed: int, name: str) -> Tensor:
    """What stands at ``position`` of an endless row of permutations of ``range(count)``."""
    passes = position // count
    out = torch.empty_like(position)
    for turn in range(int(passes[0]), int(passes[-1]) + 1):
        here = passes == turn
        permutation = torch.randperm(count, generator=_seeded(seed, name, turn))
        out[here] = permutation[position[here] - turn * count]
    return out


def require_window(domain: str, part: str, size: int, length: int) -> None:
    """Raise RequestError if ``size`` bytes of ``domain`` do not hold one window."""
    if size == 0:
        raise RequestError(
            f'domain "{domain}" has no {part} text: it is empty; leave it out of task.domains'
        )
    if size <= length:
        raise RequestError(
            f'seq_len {length} does not fit: domain "{domain}" has {size} bytes of {part} text; '
            f"choose a seq_len of at most {size - 1}"
        )


def held_out_windows(domain: str, text: bytes, length: int, windows: int) -> tuple[Tensor, Tensor]:
    """Up to ``windows`` windows of held-out text, spread evenly; the same ones every time.

    Returns (starts (n,) int64, bytes (n, length + 1) int64).
    """
    require_window(domain, "held-out", len(text), length)
    starts = window_starts(len(text), length)
    count = min(windows, len(starts))
    chosen = starts[torch.arange(count) * len(starts) // count]
    return chosen, _tensor(text)[chosen.unsqueeze(1) + torch.arange(length + 1)].long()


def passages(texts: Sequence[bytes], size: int) -> list[bytes]:
    """``size`` bytes from the middle of each text, from the start of a paragraph if possible."""
    out = []
    for text in texts:
        middle = max(0, (len(text) - size) // 2)
        line = text.find(b"\n\n", middle, middle + size)
        start = line + 2 if line >= 0 and line + 2 + size <= len(text) else middle
        out.append(text[start : start + size])
    return out
