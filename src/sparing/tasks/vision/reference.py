"""What simple known methods reach on the same images: pixels in, no network.

``nearest centroid``
    The class whose mean training image is nearest.
``least squares``
    A linear map from pixels to classes, fitted by ridge regression (penalty 1 on pixels whose
    values were scaled to standard deviation 1).
``5 neighbours``
    The class that most of the five nearest training images have, of at most 10,000 of them,
    spread evenly; of classes with as many, the one whose image is nearest.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from sparing.core.cache import cache_folder
from sparing.core.errors import RunError
from sparing.core.state import atomic_write_json
from sparing.tasks.vision.dataset import Labelled

Scores = dict[str, dict[str, float]]

_PROTOCOL = 1  # raise it whenever the figures would change for the same data
NEIGHBOURS = 5
MOST = 10_000


def references(
    train: Labelled, held_out: Labelled, classes: tuple[str, ...], fingerprint: str
) -> Scores:
    """Accuracy in percent by method, then by class and ``"mean"``; kept in the user's cache."""
    path = cache_folder() / f"vision-{_PROTOCOL}-{fingerprint[:32]}.json"
    kept = _read(path, {*classes, "mean"})
    if kept is None:
        kept = measure(train, held_out, classes)
        with suppress(RunError):  # a cache that cannot be written only costs the seconds next time
            atomic_write_json(path, kept)
    return kept


def measure(train: Labelled, held_out: Labelled, classes: tuple[str, ...]) -> Scores:
    """As ``references``, without the cache."""
    known, asked = _scaled(train.images, train.images), _scaled(held_out.images, train.images)
    found = {
        "nearest centroid": centroids(known, train.labels, asked, len(classes)),
        "least squares": least_squares(known, train.labels, asked, len(classes)),
        f"{NEIGHBOURS} neighbours": neighbours(known, train.labels, asked, len(classes)),
    }
    table: Scores = {}
    for method, guess in found.items():
        right = 100 * (guess == held_out.labels).double()
        row = {
            name: float(right[held_out.labels == number].mean())
            for number, name in enumerate(classes)
        }
        table[method] = {**row, "mean": sum(row.values()) / len(row)}
    return table


def _scaled(images: Tensor, by: Tensor) -> Tensor:
    """Pixels as rows, (N, H W C) float32, of the standard deviation 1 over all of ``by``."""
    return images.flatten(1).float() / by.float().std().clamp(min=1e-6)


def centroids(known: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
    """Known (N, d), labels (N,), asked (M, d) -> the nearest class's number, (M,)."""
    means = torch.stack([known[labels == number].mean(0) for number in range(classes)])
    nearest: Tensor = torch.cdist(asked, means).argmin(1)
    return nearest


def least_squares(known: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
    """Ridge regression on one-hot classes, the mean left unpenalised; shapes as above."""
    mean = known.mean(0)
    wide = (known - mean).double()
    wanted = torch.nn.functional.one_hot(labels, classes).double()
    inner = wide.T @ wide + torch.eye(wide.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(inner, wide.T @ (wanted - wanted.mean(0)))
    values: Tensor = (asked - mean).double() @ weights + wanted.mean(0)
    return values.argmax(1)


def neighbours(known: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
    """The vote of the nearest; shapes as above."""
    count = min(MOST, len(known))
    chosen = torch.arange(count) * len(known) // count
    known, labels = known[chosen], labels[chosen]
    square, found = known.square().sum(1), []
    for part in torch.split(asked, 1000):
        distance = square - 2 * part @ known.T  # (m, N), less what does not change the order
        near = labels[distance.topk(min(NEIGHBOURS, count), largest=False).indices]  # (m, k)
        votes = torch.zeros(len(part), classes)
        # the nearest counts a little more, so that it decides between equals
        weight = 1 + torch.arange(near.shape[1], 0, -1) * 1e-3
        found.append(votes.scatter_add_(1, near, weight.expand(near.shape)).argmax(1))
    return torch.cat(found)


def _read(path: Path, wanted: set[str]) -> Scores | None:
    """What the cache holds, if it is whole and of the right form."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        scores = {
            str(method): {str(name): float(value) for name, value in row.items()}
            for method, row in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return scores if scores and all(set(row) == wanted for row in scores.values()) else None
