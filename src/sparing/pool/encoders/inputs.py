"""Images as a vision model wants them: scaled, cut and normalised, from files or from tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sparing.core.errors import RequestError
from sparing.pool.encoders import UnreadableError
from sparing.pool.encoders.images import pictures
from sparing.pool.items import Item

PROCESSOR: Final = "preprocessor_config.json"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInputs:
    """How images become a batch (n, 3, side, side).

    The shorter side is scaled to ``shortest`` and the middle is cut out; without ``shortest`` both
    sides are scaled to ``side``. Values from 0 to 1 are then normalised by mean and std.
    """

    side: int
    shortest: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Raises UnreadableError for items without an image or with one that cannot be decoded."""
        made = torch.empty(len(items), 3, self.side, self.side)
        files = [at for at, item in enumerate(items) if item.tensor is None]
        details: dict[int, str] = {}
        try:
            found = pictures([items[at] for at in files], near=self.shortest or self.side)
        except UnreadableError as error:
            details = {files[at]: why for at, why in error.details.items()}
            found = []
        for at, image in zip(files, found, strict=False):
            made[at] = self._file(image)
        for at, item in enumerate(items):
            if item.tensor is None:
                continue
            try:
                made[at] = self._tensor(torch.from_numpy(np.ascontiguousarray(item.tensor)))
            except RequestError as error:
                details[at] = str(error)
        if details:
            raise UnreadableError(details)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (made - mean[:, None, None]) / std[:, None, None]

    def _target(self, high: int, wide: int) -> tuple[int, int]:
        if self.shortest is None:
            return self.side, self.side
        scale = self.shortest / min(high, wide)
        least = max(self.side, self.shortest)
        return max(least, round(high * scale)), max(least, round(wide * scale))

    def _file(self, image: Any) -> Tensor:
        from PIL import Image

        high, wide = self._target(image.height, image.width)
        top, left = (high - self.side) // 2, (wide - self.side) // 2
        scaled = image.resize((wide, high), Image.Resampling.BICUBIC)
        cut = scaled.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255

    def _tensor(self, image: Tensor) -> Tensor:
        values = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        values = values[None] if values.ndim == 2 else values
        if values.ndim != 3 or values.shape[0] not in (1, 3):
            raise RequestError(
                f"a tensor of shape {tuple(image.shape)} is no image; expected (3, height, width), "
                "(1, height, width) or (height, width)"
            )
        high, wide = self._target(*values.shape[1:])
        top, left = (high - self.side) // 2, (wide - self.side) // 2
        scaled = functional.interpolate(
            values[None], (high, wide), mode="bicubic", antialias=True, align_corners=False
        )[0]
        cut = scaled[:, top : top + self.side, left : left + self.side]
        return cut.clamp(0, 1).expand(3, -1, -1)


def of_folder(path: Path) -> ImageInputs:
    """As the model's image processor says in its file. Raises RequestError without one."""
    file = path / PROCESSOR
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RequestError(
            f"{path} has no {PROCESSOR}, so it is not known how its model wants images; write it "
            "with the image processor's save_pretrained"
        ) from error
    except (OSError, ValueError) as error:
        raise RequestError(f"{file} cannot be read ({error}); write it anew") from error
    size, crop = said.get("size"), said.get("crop_size")
    shortest, side = _side(size)
    if said.get("do_center_crop") and crop is not None:
        side = _side(crop)[1] or side
        shortest = shortest or _side(size)[1]
    if side is None:
        side = shortest
    if side is None:
        raise RequestError(f"{file} names no size of images; expected size or crop_size")
    normal = said.get("do_normalize", True)
    return ImageInputs(
        side=side,
        shortest=shortest,
        mean=_three(said.get("image_mean") if normal else None, 0.0, file),
        std=_three(said.get("image_std") if normal else None, 1.0, file),
    )


def _side(size: Any) -> tuple[int | None, int | None]:
    """(shortest side, side of a square) of what a processor's file calls a size."""
    if isinstance(size, int):
        return None, size
    if not isinstance(size, dict):
        return None, None
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), None
    return None, int(size["height"]) if "height" in size else None


def _three(values: Any, otherwise: float, file: Path) -> tuple[float, float, float]:
    if values is None:
        return otherwise, otherwise, otherwise
    if not isinstance(values, list) or len(values) != 3:
        raise RequestError(f"{file}: expected three values, one a colour, got {values!r}")
    return float(values[0]), float(values[1]), float(values[2])
