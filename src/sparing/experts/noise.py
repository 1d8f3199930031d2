"""Random numbers of a router's own, the same again when a forward pass is recomputed."""

from __future__ import annotations

import hashlib
from typing import Any, final

import torch
from torch import Tensor, nn

from sparing.core.ranks import rank
from sparing.core.recompute import recomputing

REMEMBERED = 1024
"""Forward passes whose draws can be repeated; more than any accumulation of micro-batches."""

DRAW, REPEATED, SHAPE, MARK = 0, 1, slice(2, 4), slice(4, 8)
"""Columns of what is remembered of a pass: its number, or -1; whether it was repeated; its input's
shape, and what tells that input from others."""


@final
class Noise(nn.Module):
    """A ``torch.Generator`` for each training pass of one router, from a seed and a count.

    draws: () int64, passes so far, part of the state dict: with the seed, which the model's own
    construction gives, it is all of the generator's state, so that training resumes bit for bit.
    Ranks draw differently: noise belongs to tokens, and theirs differ.

    Evaluation asks for no generator. When activation checkpointing repeats a pass in backward, the
    pass is found again by its input, and its generator is given again; the count stays. Of passes
    with equal inputs the latest not yet repeated is taken, which is the order of one backward
    pass through all of them.

    Compiled, a draw is an operator, so that it sees when it runs which pass it is: the numbers are
    those of the same passes without compilation.
    """

    draws: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        # (REMEMBERED, 8): no buffer, since it is neither saved nor to be rounded with the model
        self.recent = _nothing()

    def __getstate__(self) -> dict[str, Any]:
        # what waits for a backward pass belongs to a graph, and is not copied with the module
        return {**self.__dict__, "recent": _nothing()}

    def normal(self, x: Tensor, columns: int) -> Tensor:
        """(T, columns) standard normal, of the dtype of x: (T, d); drawn in float32."""
        return self._drawn(x, columns, True)

    def uniform(self, x: Tensor, columns: int) -> Tensor:
        """(T, columns) uniform in [0, 1), of the dtype of x: (T, d); drawn in float32."""
        return self._drawn(x, columns, False)

    @torch.no_grad()
    def _drawn(self, x: Tensor, columns: int, normal: bool) -> Tensor:
        if self.recent.device != x.device:
            self.recent = self.recent.to(x.device)
        draw = _operator if torch.compiler.is_compiling() else _draw
        drawn: Tensor = draw(x.detach(), self.draws, self.recent, self.seed, columns, normal)
        return drawn


def _nothing() -> Tensor:
    return torch.full((REMEMBERED, MARK.stop), -1.0, dtype=torch.float64)


def _draw(
    x: Tensor, draws: Tensor, recent: Tensor, seed: int, columns: int, normal: bool
) -> Tensor:
    draw = _number(x, draws, recent)
    key = hashlib.blake2b(f"{seed} {rank()} {draw}".encode(), digest_size=8).digest()
    generator = torch.Generator(device=x.device).manual_seed(int.from_bytes(key, "big") >> 1)
    random = torch.randn if normal else torch.rand
    return random(x.shape[0], columns, generator=generator, device=x.device).to(x.dtype)


def _number(x: Tensor, draws: Tensor, recent: Tensor) -> int:
    """Which training pass this is, counted from 0: a new one, or the one that is recomputed."""
    shape = list(x.shape)
    if recomputing():
        known = recent[recent[:, DRAW] >= 0]
        if len(known):
            return _again(shape, _mark(x), known, recent)
    draw = int(draws)
    draws += 1
    place = recent[draw % len(recent)]
    place[: MARK.start] = torch.tensor([draw, 0, *shape], dtype=torch.float64)
    place[MARK] = _mark(x)
    return draw


def _again(shape: list[int], mark: Tensor, known: Tensor, recent: Tensor) -> int:
    """The draw of the pass that is recomputed: the nearest input, since kernels may round."""
    away = (known[:, MARK] - mark).abs().sum(1).nan_to_num(0.0)
    *_, draw = min(
        (row[SHAPE] != shape, distance, row[REPEATED], -row[DRAW], int(row[DRAW]))
        for row, distance in zip(known.tolist(), away.tolist(), strict=True)
    )
    recent[draw % len(recent), REPEATED] = 1.0
    return draw


def _mark(x: Tensor) -> Tensor:
    """Four numbers that tell one input from another, (4,) float64; no sync with the device."""
    if x.numel() == 0:
        return torch.zeros(4, dtype=torch.float64, device=x.device)
    first, last = x[0].double(), x[-1].double()
    return torch.stack([x.sum().double(), x.abs().sum().double(), first.sum(), last.sum()])


@torch.library.custom_op("sparing::noise", mutates_args=("draws", "recent"))
def _operator(
    x: Tensor, draws: Tensor, recent: Tensor, seed: int, columns: int, normal: bool
) -> Tensor:
    return _draw(x, draws, recent, seed, columns, normal)


@_operator.register_fake
def _(x: Tensor, draws: Tensor, recent: Tensor, seed: int, columns: int, normal: bool) -> Tensor:
    return x.new_empty(x.shape[0], columns)
