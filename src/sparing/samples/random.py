"""A random part of the samples in each epoch: the control that every choice must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.samples.annealing import annealing
from sparing.samples.draw import Random, rounded, thin_
from sparing.samples.infobatch import check_ratio
from sparing.samples.method import SampleSelection
from sparing.samples.options import SelectionOptions
from sparing.samples.scores import ScoreTable
from sparing.samples.selection import Selection, chosen, everything


def plan(size: int, random: Random, *, keep: int) -> Selection:
    """Exactly ``keep`` of ``size`` samples, each subset as likely as any other, weight 1."""
    if keep >= size:
        return everything(size, random)
    code = np.ones(size, dtype=np.uint8)
    thin_(code, 1, keep, random)
    return chosen(code, random)


@final
@dataclass(frozen=True, kw_only=True)
class RandomSamplesOptions(SelectionOptions):
    """Options of random samples.

    ratio: share that each epoch leaves out, in [0, 1). delta: share of the epochs that leave
    something out; the rest are full. lengths: the samples of each epoch instead, as another
    method's plans had; epochs past its end are as the last.
    """

    ratio: float = 0.3
    delta: float = 1.0
    lengths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)
        require_number("delta", self.delta, 0, 1)
        if self.lengths is not None:
            if not self.lengths:
                raise RequestError("lengths must name the samples of at least one epoch")
            for length in self.lengths:
                require_whole("lengths", length, 1)
            object.__setattr__(self, "lengths", tuple(self.lengths))


@final
class RandomSamples(SampleSelection):
    """Takes a random part of the samples; each step is an unbiased estimate."""

    name: ClassVar[str] = "random-samples"
    Options = RandomSamplesOptions
    scored: ClassVar[bool] = False
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}

    @classmethod
    def at_random(cls, options: Mapping[str, Any], signals: Mapping[str, Any]) -> None:
        """Nothing: this is chance already."""

    @property
    def idle(self) -> bool:
        return self.options.ratio == 0 and self.options.lengths is None

    @property
    def anneals(self) -> bool:
        return self.options.delta < 1 and self.options.lengths is None

    def choose(self, epoch: int, scores: ScoreTable, random: Random) -> Selection:
        return plan(self.size, random, keep=self.bounds(epoch)[0])

    def bounds(self, epoch: int) -> tuple[int, int]:
        options, size = self.options, self.size
        keep = max(1, rounded(1 - options.ratio, size))
        if options.lengths is not None:
            keep = min(size, options.lengths[min(epoch, len(options.lengths) - 1)])
        elif self.anneals and epoch >= annealing(options.delta, self.epochs):
            keep = size
        return keep, keep
