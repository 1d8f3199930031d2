"""CIFAR-10 (Krizhevsky 2009): the authors' binary files, or JPEG bytes in one npz file."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.tasks.vision.dataset import Labelled

CLASSES: Final = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
FOLDER = "cifar-10-batches-bin"
BUNDLE = "cifar10.npz"
_ROW = 1 + 3 * 32 * 32


def load(places: Sequence[Path], make: Callable[..., Any]) -> Any:
    """What ``make(train=, test=, classes=, remark=, human=)`` makes of the first place's files.

    Raises RequestError if none has, or Pillow is needed and missing.
    """
    for place in places:
        if (place / FOLDER).is_dir():
            files = [f"data_batch_{number}.bin" for number in range(1, 6)]
            train = [_binary(place / FOLDER / file) for file in files]
            whole = Labelled(
                images=torch.cat([part.images for part in train]),
                labels=torch.cat([part.labels for part in train]),
            )
            test = _binary(place / FOLDER / "test_batch.bin")
            return make(train=whole, test=test, classes=CLASSES)
        if (place / BUNDLE).is_file():
            with np.load(place / BUNDLE, allow_pickle=False) as bundle:
                parts = {part: _bundled(bundle, part) for part in ("train", "test")}
                human = _human(bundle)
            remark = (
                "A JPEG copy of CIFAR-10, which is lossy: absolute accuracies are not comparable "
                "with published ones."
            )
            return make(
                train=parts["train"], test=parts["test"], classes=CLASSES, remark=remark,
                human=human,
            )  # fmt: skip
    raise RequestError(
        f"CIFAR-10 is not at hand: put the binary version, unpacked ({FOLDER}), or {BUNDLE} into "
        "$SPARING_DATA, or take images that are shipped: -s task.dataset=fashion-mnist-small"
    )


def _binary(file: Path) -> Labelled:
    """Rows of a label and 3 x 32 x 32 pixels, channel by channel."""
    try:
        content = np.fromfile(file, dtype=np.uint8)
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({error}); unpack CIFAR-10 again") from error
    if not content.size or content.size % _ROW:
        raise RequestError(f"{file} is cut short; unpack CIFAR-10 again")
    rows = content.reshape(-1, _ROW)
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Labelled(
        images=torch.from_numpy(np.ascontiguousarray(images)),
        labels=torch.from_numpy(rows[:, 0].astype(np.int64)),
    )


def _human(bundle: Any) -> torch.Tensor | None:
    """CIFAR-10N (Wei et al. 2022, arXiv 2110.12088): labels of three people each, (N, 3) int64."""
    names = [f"n_random_label{number}" for number in (1, 2, 3)]
    if not all(name in bundle.files for name in names):
        return None
    return torch.from_numpy(np.stack([bundle[name].astype(np.int64) for name in names], axis=1))


def _bundled(bundle: Any, part: str) -> Labelled:
    """``{part}_bytes``: JPEG files one after the other, cut at ``{part}_off``; ``y_{part}``."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise RequestError(
            f'{BUNDLE} holds JPEG files; reading them needs pillow: pip install "sparing[vision]"'
        ) from error
    content, cuts = bundle[f"{part}_bytes"].tobytes(), bundle[f"{part}_off"].tolist()
    images: NDArray[np.uint8] = np.empty((len(cuts) - 1, 32, 32, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        with Image.open(io.BytesIO(content[cuts[number] : cuts[number + 1]])) as file:
            image[:] = np.asarray(file.convert("RGB"))
    labels = torch.from_numpy(bundle[f"y_{part}"].astype(np.int64))
    return Labelled(images=torch.from_numpy(images), labels=labels)
