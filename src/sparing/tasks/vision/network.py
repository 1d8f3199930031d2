"""A small residual network for small images, from pixels to logits."""

from __future__ import annotations

from itertools import pairwise
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


@final
class Block(nn.Module):
    """Two 3 x 3 convolutions around which the input is carried, projected where shapes differ.

    He et al. 2016 (arXiv 1512.03385), the basic block, with option B for the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                _conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C', H / stride, W / stride)."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


@final
class ResNet(nn.Module):
    """Takes pixels as they are stored, uint8 or floats from 0 to 255, and normalises them itself.

    ``mean`` and ``std``: (C,), of the training pixels in [0, 1]; they are saved with the model.
    """

    def __init__(
        self,
        *,
        mean: Tensor,
        std: Tensor,
        widths: tuple[int, ...],
        blocks: int,
        stem_stride: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", 255 * mean.view(1, -1, 1, 1))
        self.register_buffer("std", 255 * std.view(1, -1, 1, 1))
        self.stem = _conv(mean.numel(), widths[0], 3, stem_stride)
        self.norm = nn.BatchNorm2d(widths[0])
        stages = []
        for number, (inputs, outputs) in enumerate(pairwise((widths[0], *widths))):
            first = Block(inputs, outputs, 2 if number else 1)
            rest = [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees: images (B, C, H, W) -> (B, D)."""
        x = (images.float() - self.mean) / self.std
        x = F.relu(self.norm(self.stem(x)))
        return torch.flatten(F.adaptive_avg_pool2d(self.stages(x), 1), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits
