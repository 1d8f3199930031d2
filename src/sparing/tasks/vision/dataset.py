"""Images with labels: the samples of the task, and how they are split by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparing.tasks.vision.augment import augmented


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """``images`` (N, H, W, C) uint8 and ``labels`` (N,) int64, positions in the class names."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.numel())

    def take(self, index: Tensor) -> Labelled:
        """The samples ``index``, (n,) int64 or (N,) bool."""
        return Labelled(images=self.images[index], labels=self.labels[index])


def development(whole: Labelled) -> Tensor:
    """Which training images are the held-out ones: the last sixth of each class, (N,) bool."""
    held_out = torch.zeros(len(whole), dtype=torch.bool)
    for label in torch.unique(whole.labels):
        members = (whole.labels == label).nonzero().flatten()
        held_out[members[len(members) - len(members) // 6 :]] = True
    return held_out


@final
class Images:
    """The training samples: whole batches of images, augmented by seed, epoch and image.

    ``seed`` and ``crop``, ``flip``: of the augmentation. A host tells the epoch by ``set_epoch``.
    """

    def __init__(
        self, data: Labelled, *, seed: int, crop: int, flip: bool, channels_last: bool = True
    ) -> None:
        self.data, self.seed, self.crop, self.flip = data, seed, crop, flip
        self.channels_last = channels_last
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        """Each epoch shows an image moved and mirrored in its own way."""
        self.epoch = epoch

    def laid_out(self, images: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, C, H, W), with channels last in memory or not."""
        how = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.permute(0, 3, 1, 2).contiguous(memory_format=how)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """``index`` (B,) int64 -> ``images`` (B, C, H, W) uint8 and ``labels`` (B,) int64."""
        index = index.long()
        images = augmented(
            self.data.images[index],
            index,
            seed=self.seed,
            epoch=self.epoch,
            crop=self.crop,
            flip=self.flip,
        )
        return {"images": self.laid_out(images), "labels": self.data.labels[index]}

    def plain(self, index: Tensor) -> dict[str, Tensor]:
        """The same batch, neither moved nor mirrored."""
        index = index.long()
        return {
            "images": self.laid_out(self.data.images[index]),
            "labels": self.data.labels[index],
        }
