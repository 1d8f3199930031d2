"""Numbers that look random and depend on a token alone, never on its batch."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 16
"""Sign bits of an input's code: 65,536 codes. More bits would tell inputs apart better, but each
is one more that rounding can flip."""

_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def mix(codes: Tensor) -> Tensor:
    """Scramble int64 numbers, each by itself; the finaliser of SplitMix64 (Steele et al. 2014)."""
    codes = codes + _GOLDEN
    codes = (codes ^ _shift(codes, 30)) * _FIRST
    codes = (codes ^ _shift(codes, 27)) * _SECOND
    return codes ^ _shift(codes, 31)


def _shift(codes: Tensor, by: int) -> Tensor:
    # the shift of signed numbers repeats the sign, which does not belong to the bits
    return (codes >> by) & ((1 << (64 - by)) - 1)


def uniform(codes: Tensor, columns: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1) for codes (T,) int64: (T, columns) float32, by seed and column."""
    place = torch.arange(columns, device=codes.device, dtype=torch.int64)
    keys = mix(mix(codes + (seed & 0x7FFFFFFF))[:, None] + place)
    # 24 bits are what a float32 holds exactly
    return _shift(keys, 40).float() / (1 << 24)


def projection(dim: int, seed: int) -> Tensor:
    """Random directions for ``sign_codes``, (BITS, d) float32."""
    return torch.randn(BITS, dim, generator=torch.Generator().manual_seed(seed))


def sign_codes(x: Tensor, directions: Tensor) -> Tensor:
    """Which side of each random plane the tokens lie on: x: (T, d) -> (T,) int64.

    Random-hyperplane hashing (Charikar 2002): tokens at a small angle share a code.
    """
    bits = (x @ directions.to(x.dtype).t() > 0).long()
    return (bits << torch.arange(directions.shape[0], device=x.device)).sum(1)
