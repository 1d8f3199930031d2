"""What can be chosen about the vision task, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown

DATASETS = ("fashion-mnist", "fashion-mnist-small", "cifar10")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class VisionOptions:
    """Data, model shape and evaluation of image classification.

    ``dataset``: the whole of Fashion-MNIST (fetched if need be), the small part of it that is
    shipped with this library, or CIFAR-10. ``split``: evaluate on the ``test`` images; or, to
    choose settings by, on a ``development`` part of the training images (the last sixth of each
    class), which are then not trained on. The model is a residual network: a 3 x 3 convolution of
    ``stem_stride``, then a stage of ``blocks`` basic blocks for each of ``widths``, all stages but
    the first halving the resolution. A training image is moved by up to ``crop`` pixels each way
    and, with ``flip``, mirrored every other time. ``channels_last``: pixels before channels in
    memory, which is faster in most places. ``eval_batch`` images are evaluated at a time.

    ``duplicates``: so many copies, as a share of the training images, are put among them, half of
    them a little changed; ``noise``: the share of these images, copies among them, that then gets
    a wrong label, ``uniform`` among the other classes, or as a ``human`` gave it (CIFAR-10N).

    Raises RequestError for names that are not known and numbers that do not fit.
    """

    dataset: Literal["fashion-mnist", "fashion-mnist-small", "cifar10"] = "fashion-mnist-small"
    split: Literal["test", "development"] = "test"
    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 1
    stem_stride: int = 2
    crop: int = 2
    flip: bool = True
    channels_last: bool = True
    eval_batch: int = 500
    duplicates: float = 0.0
    noise: float = 0.0
    noise_labels: Literal["uniform", "human"] = "uniform"

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise unknown("dataset", self.dataset, DATASETS)
        if self.split not in ("test", "development"):
            raise RequestError(f'split must be test or development, got "{self.split}"')
        require_number("duplicates", self.duplicates, 0)
        require_number("noise", self.noise, 0, 1)
        if self.noise_labels not in ("uniform", "human"):
            raise RequestError(f'noise_labels must be uniform or human, got "{self.noise_labels}"')
        if self.noise_labels == "human" and self.dataset != "cifar10":
            raise RequestError(
                f"people labelled cifar10 anew, not {self.dataset}; set noise_labels=uniform"
            )
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.widths:
            raise RequestError("widths must name the channels of at least one stage")
        for width in self.widths:
            require_whole("widths", width, 1)
        for option in ("blocks", "eval_batch"):
            require_whole(option, getattr(self, option), 1)
        require_whole("crop", self.crop, 0)
        if self.crop > 8:
            raise RequestError(
                f"crop moves images by up to that many pixels, at most 8: {self.crop}"
            )
        if self.stem_stride not in (1, 2):
            raise RequestError(f"stem_stride must be 1 or 2, got {self.stem_stride}")
