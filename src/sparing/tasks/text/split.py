"""Which texts are trained on and which are held out: by what they say, not by where they stand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

SEED: Final = 0
"""Of the split, fixed: every run and every comparison has the same test texts."""
TEST: Final = 0.25
DEVELOPMENT: Final = 0.15


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Positions of texts, each (n,) int64 and ascending; every text is in exactly one part."""

    train: Tensor
    development: Tensor
    test: Tensor


def same(text: str) -> str:
    """What two texts have in common that differ in case, spaces or punctuation only."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def split(keys: Sequence[str], labels: Tensor) -> Split:
    """Split texts by their keys, (N,) each: texts with the same ``same(key)`` stay together.

    Of the distinct keys of each class, those with the lowest hash are the test part, the next the
    development part: ``round(TEST * n)`` and ``round(DEVELOPMENT * n)`` of n. The order of the
    texts plays no part. A key with several labels counts for the class where it comes first.
    """
    members: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        members.setdefault(same(key), []).append(position)
    by_class: dict[int, list[str]] = {}
    for key, positions in members.items():
        by_class.setdefault(int(labels[positions[0]]), []).append(key)
    found: tuple[list[int], ...] = ([], [], [])
    for distinct in by_class.values():
        distinct.sort(key=_place)
        first = round(TEST * len(distinct))
        second = first + round(DEVELOPMENT * len(distinct))
        for part, chosen in zip(
            found, (distinct[second:], distinct[first:second], distinct[:first]), strict=True
        ):
            part.extend(position for key in chosen for position in members[key])
    train, development, test = (torch.tensor(sorted(p), dtype=torch.int64) for p in found)
    return Split(train=train, development=development, test=test)


def _place(key: str) -> bytes:
    return hashlib.sha256(f"{SEED}/{key}".encode()).digest()
