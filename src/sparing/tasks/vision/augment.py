"""Moving and mirroring images, by chance that is a function of seed, epoch and image alone.

Nothing is drawn in sequence: an image looks the same in an epoch whatever came before it, so a
resumed run, workers, and arms of a comparison that leave out other images all see the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]


def _mixed(z: Words) -> Words:
    """The finaliser of SplitMix64: Steele, Lea and Flood 2014 (doi 10.1145/2660193.2660195)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def words(index: NDArray[np.int64], seed: int, epoch: int) -> Words:
    """64 random bits for each image ``index`` (B,)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = np.array([seed, epoch], dtype=np.int64).astype(np.uint64)
    key = _mixed(_mixed((start[:1] + np.uint64(1)) * golden) + start[1:] * golden)
    return _mixed(key + (index.astype(np.uint64) + np.uint64(1)) * golden)


def draws(bits: Words, crop: int, flip: bool) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Down and right, each (B,) in [0, 2 crop], and whether to mirror, (B,) bool."""
    reach = np.uint64(2 * crop + 1)
    down = ((bits >> np.uint64(8)) & np.uint64(0xFFFFFF)) * reach >> np.uint64(24)
    right = ((bits >> np.uint64(32)) & np.uint64(0xFFFFFF)) * reach >> np.uint64(24)
    mirror = (bits & np.uint64(1)).astype(bool) & flip
    return down.astype(np.int64), right.astype(np.int64), mirror


def augmented(
    images: Tensor, index: Tensor, *, seed: int, epoch: int, crop: int, flip: bool
) -> Tensor:
    """Images (B, H, W, C) uint8, each moved over a black border and mirrored or not."""
    if not crop and not flip:
        return images
    size, height, width, channels = images.shape
    down, right, mirror = draws(words(index.numpy(), seed, epoch), crop, flip)
    padded = np.zeros((size, height + 2 * crop, width + 2 * crop, channels), dtype=np.uint8)
    padded[:, crop : crop + height, crop : crop + width] = images.numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    moved = windows[np.arange(size), down, right]  # (B, C, H, W), a copy of whole rows
    moved[mirror] = moved[mirror][..., ::-1]
    return torch.from_numpy(moved).permute(0, 2, 3, 1)
