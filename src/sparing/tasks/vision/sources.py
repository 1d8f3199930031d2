"""Where images come from: the package, ``$SPARING_DATA``, the user's cache, or the network."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from sparing.core.cache import cache_folder, places
from sparing.core.errors import RequestError
from sparing.tasks.vision import cifar10, fetch, idx
from sparing.tasks.vision.dataset import Labelled

FASHION = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A data set's training and test images, the names of its classes, and what to know of it.

    ``human``: (N, 3) int64, labels that three people each gave the training images, where known.
    """

    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    remark: str = ""
    human: Tensor | None = None


def load(dataset: str) -> Source:
    """The data set of that name, an option of the task.

    Raises RequestError where it is not at hand and cannot be fetched, and for damaged files.
    """
    if dataset == "fashion-mnist-small":
        folder = resources.files("sparing.tasks.vision").joinpath("data")
        with resources.as_file(folder) as path:
            return _fashion(
                path, checked=False, remark="A class-balanced part of Fashion-MNIST: 2,400 images."
            )
    if dataset == "fashion-mnist":
        return _fashion(_whole_fashion(), checked=True)
    found: Source = cifar10.load(places(""), Source)
    return found


def _whole_fashion() -> Path:
    known = [*places("fashion-mnist"), *places("")[:-1], INSTALLED]
    for place in known:
        if all(idx.find(place, stem) for stem in idx.STEMS):
            return place
    return fetch.fashion_mnist(cache_folder() / "fashion-mnist")


def _fashion(folder: Path, *, checked: bool, remark: str = "") -> Source:
    parts = {}
    for part in ("train", "t10k"):
        images = idx.read(folder, f"{part}-images-idx3-ubyte", checked=checked)
        labels = idx.read(folder, f"{part}-labels-idx1-ubyte", checked=checked)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise RequestError(
                f"the {part} files in {folder} do not fit: images {images.shape}, labels "
                f"{labels.shape}; delete them, they are fetched again"
            )
        parts[part] = Labelled(
            images=torch.from_numpy(images).unsqueeze(-1), labels=torch.from_numpy(labels).long()
        )
    return Source(train=parts["train"], test=parts["t10k"], classes=FASHION, remark=remark)


def fingerprint(*parts: Labelled) -> str:
    """SHA-256 over images and labels: results on other data are not comparable."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{tuple(part.images.shape)}".encode())
        digest.update(part.images.numpy().tobytes())
        digest.update(part.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
