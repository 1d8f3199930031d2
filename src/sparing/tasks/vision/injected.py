"""Copies and wrong labels put into the training images, and known: what cleaning has to find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.core.select import choose, rounded, weighted_choice
from sparing.tasks.vision.dataset import Labelled

SEED: Final = 20_240_528
"""Of what is injected: the same for every seed of a run, so that its arms share the data."""
BRIGHTER, GRAIN = 0.06, 3.0
"""How much the contrast of a changed copy varies, and the deviation of its noise, of 255."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Injected:
    """``data``, M training images in their order of arrival, and the truth about them.

    ``origin``: (M,) int64, the image among those before that each is, or is a copy of. ``copy``:
    (M,) bool, whether it was added; ``exact``: (M,) bool, added bit for bit. ``truth``: (M,) int64,
    the right labels.
    """

    data: Labelled
    origin: Tensor
    copy: Tensor
    exact: Tensor
    truth: Tensor

    @property
    def wrong(self) -> Tensor:
        """(M,) bool, whether the label is a wrong one."""
        return self.data.labels != self.truth

    def page(self) -> dict[str, Any]:
        """``tables``, and ``planted`` {copies: groups of ids, wrong: ids}, for a page."""
        order = torch.argsort(self.origin, stable=True)
        counts = torch.bincount(self.origin)
        groups = [part.tolist() for part in torch.split(order, counts.tolist()) if len(part) > 1]
        several = int((torch.bincount(self.origin[self.copy]) > 1).sum())
        rows = [
            ["images as they were", len(self.data) - int(self.copy.sum())],
            ["copies, bit for bit", int(self.exact.sum())],
            ["copies, a little changed", int((self.copy & ~self.exact).sum())],
            ["images copied more than once", several],
            ["wrong labels", int(self.wrong.sum())],
        ]
        table = {
            "title": "What was put into the training images",
            "about": "Copies of random training images at random places among them, half of them "
            "brighter or darker and grained, half of these moved by up to a pixel; then wrong "
            "labels. Held-out images are as they were.",
            "head": ["what", "images"],
            "rows": [[name, f"{count:,}"] for name, count in rows],
            "words": 1,
        }
        wrong = self.wrong.nonzero().flatten().tolist()
        return {"tables": [table], "planted": {"copies": groups, "wrong": wrong}}


def inject(
    data: Labelled,
    *,
    classes: int,
    duplicates: float,
    noise: float,
    human: Tensor | None = None,
) -> Injected:
    """Add ``round(duplicates * N)`` copies, then make ``round(noise * M)`` labels wrong.

    human: (N, a) int64, labels that people gave; wrong ones are drawn among those, an image that
    more of them got wrong the likelier. Without them each other class is as likely. Raises
    RequestError for more wrong labels than people gave.
    """
    random = torch.Generator().manual_seed(SEED)
    size, extra = len(data), rounded(duplicates, len(data))
    sources = torch.randint(size, (extra,), generator=random)
    changed = torch.rand(extra, generator=random) < 0.5
    # copies come at random places, all others keep their order
    places = choose(torch.rand(size + extra, generator=random), extra)
    copy = torch.zeros(size + extra, dtype=torch.bool)
    copy[places] = True
    origin = torch.empty(size + extra, dtype=torch.int64)
    origin[~copy], origin[copy] = torch.arange(size), sources
    exact = torch.zeros_like(copy)
    exact[places[~changed]] = True
    images = data.images[origin]
    images[places[changed]] = altered(images[places[changed]], random)
    truth = data.labels[origin]
    count = rounded(noise, len(origin))
    if human is None:
        labels = _uniform(truth, count, classes, random)
    else:
        labels = _human(truth, count, human[origin], random)
    found = Labelled(images=images, labels=labels)
    return Injected(data=found, origin=origin, copy=copy, exact=exact, truth=truth)


def altered(images: Tensor, random: torch.Generator) -> Tensor:
    """Images (n, H, W, C) uint8 in contrast changed and grained, half moved by up to a pixel."""
    size = len(images)
    moved = images.clone()
    moves = torch.rand(size, generator=random) < 0.5
    down = torch.randint(-1, 2, (size,), generator=random) * moves
    right = torch.randint(-1, 2, (size,), generator=random) * moves
    for shift in (-1, 1):  # the border is repeated
        rows, columns = down == shift, right == shift
        moved[rows] = _shifted(moved[rows], shift, 1)
        moved[columns] = _shifted(moved[columns], shift, 2)
    scale = 1 + BRIGHTER * (2 * torch.rand(size, 1, 1, 1, generator=random) - 1)
    grain = GRAIN * torch.randn(moved.shape, generator=random)
    return (moved * scale + grain).round().clamp(0, 255).to(torch.uint8)


def _shifted(images: Tensor, by: int, along: int) -> Tensor:
    edge = images.narrow(along, 0 if by > 0 else images.shape[along] - 1, 1)
    rest = images.narrow(along, 0 if by > 0 else 1, images.shape[along] - 1)
    return torch.cat([edge, rest] if by > 0 else [rest, edge], dim=along)


def _uniform(truth: Tensor, count: int, classes: int, random: torch.Generator) -> Tensor:
    labels = truth.clone()
    where = choose(torch.rand(len(truth), generator=random), count)
    step = torch.randint(1, classes, (count,), generator=random)
    labels[where] = (truth[where] + step) % classes
    return labels


def _human(truth: Tensor, count: int, given: Tensor, random: torch.Generator) -> Tensor:
    labels = truth.clone()
    misread = given != truth[:, None]
    able = int(misread.any(1).sum())
    if count > able:
        raise RequestError(
            f"noise asks for {count} wrong labels, and people gave only {able} of these "
            f"{len(truth)} images one; lower it to {able / len(truth):.3f}, or set "
            "noise_labels=uniform"
        )
    where = weighted_choice(misread.sum(1).double(), count, random)
    chance = misread[where].double() * torch.rand(count, given.shape[1], generator=random)
    labels[where] = given[where].gather(1, chance.argmax(1, keepdim=True)).flatten()
    return labels
