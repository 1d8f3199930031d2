"""The options that all methods that choose samples have."""

from __future__ import annotations

from dataclasses import dataclass

from sparing.core.errors import unknown
from sparing.samples.selection import NORMALISE


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Abstract: options of a method that chooses samples.

    ``normalise``: what is done with the weights of samples that stand for others, if there are
    any. "none": nothing, as published: the sum of weighted gradients over an epoch is unbiased,
    but each of its fewer steps is larger. "epoch": they are divided by their mean over the epoch:
    each step is an unbiased estimate of the full mean gradient. "batch": by their mean over the
    batch, which leaves a small bias of the order of 1 / batch size.
    """

    normalise: str = "epoch"

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISE:
            raise unknown("way to normalise weights", self.normalise, NORMALISE)
