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

import torch
from torch import Tensor

from sparing.tasks import figures
from sparing.tasks.figures import Scores
from sparing.tasks.vision.dataset import Labelled

_PROTOCOL = 1  # raise it whenever the figures would change for the same data
NEIGHBOURS = 5
MOST = 10_000


def references(
    train: Labelled, held_out: Labelled, classes: tuple[str, ...], fingerprint: str
) -> Scores:
    """Accuracy in percent by method, then by class and ``"mean"``; kept in the user's cache."""
    name = f"vision-{_PROTOCOL}"
    return figures.kept(
        name, fingerprint, {*classes, "mean"}, lambda: measure(train, held_out, classes)
    )


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
