"""Upper confidence bounds: keep the samples whose loss is, or may be, high.

Raju et al. 2021 (arXiv 2111.12621): each sample is an arm; its loss has a moving mean and a moving
variance, and the samples with the lowest bound are left out until the next choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number, require_whole
from sparing.samples.annealing import Annealed
from sparing.samples.draw import Random, rounded, thin_
from sparing.samples.infobatch import check_ratio
from sparing.samples.options import SelectionOptions
from sparing.samples.scores import ScoreTable
from sparing.samples.selection import Selection, chosen, everything


def highest(bound: NDArray[np.float32], keep: int, random: Random) -> NDArray[np.uint8]:
    """1 for exactly the ``keep`` highest of (N,) values, else 0; ties by lot, NaN is highest."""
    code = np.ones(bound.size, dtype=np.uint8)
    out = bound.size - keep
    if out <= 0:
        return code
    filled = np.where(np.isnan(bound), np.float32(np.inf), bound)
    border = np.partition(filled, out - 1)[out - 1]
    code[filled < border] = 0
    equal = np.flatnonzero(filled == border)
    stay = np.ones(equal.size, dtype=np.uint8)
    thin_(stay, 1, keep - int(np.count_nonzero(filled > border)), random)
    code[equal] = stay
    return code


def plan(
    epoch: int,
    mean: NDArray[np.float32],
    variance: NDArray[np.float32],
    random: Random,
    *,
    ratio: float,
    width: float,
    anneal: int | None = None,
    before: Selection | None = None,
) -> Selection:
    """The samples of an epoch, counted from 0, all with weight 1.

    mean, variance: (N,), NaN where unknown, which is kept. The ``round((1 - ratio) * N)`` samples
    with the highest ``mean + width * sqrt(variance)`` are kept, ties by lot; those of ``before``
    again if it is given, in a new order.
    """
    if (anneal is not None and epoch >= anneal) or np.isnan(mean).all():
        return everything(mean.size, random)
    if before is not None and before.code is not None:
        return chosen(before.code, random)
    keep = max(1, rounded(1 - ratio, mean.size))
    bound = (mean + width * np.sqrt(variance)).astype(np.float32)
    return chosen(highest(bound, keep, random), random)


@final
@dataclass(frozen=True, kw_only=True)
class UCBOptions(SelectionOptions):
    """Options of UCB.

    ratio: share that is left out, in [0, 1). width: standard deviations above the mean. momentum:
    of the moving mean and variance. every: epochs until the next choice. delta: share of the
    epochs that choose; the rest are full.
    """

    ratio: float = 0.4
    width: float = 1.0
    momentum: float = 0.8
    every: int = 10
    delta: float = 0.875

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)
        require_number("width", self.width, 0)
        require_number("momentum", self.momentum, 0, 1)
        require_whole("every", self.every, 1)
        require_number("delta", self.delta, 0, 1)


@final
class UCB(Annealed):
    """Keeps the samples with the highest upper bound of their loss; biased by design."""

    name: ClassVar[str] = "ucb"
    Options = UCBOptions
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}

    @property
    def idle(self) -> bool:
        return bool(self.options.ratio == 0)

    def table(self, size: int) -> ScoreTable:
        return ScoreTable(size, "variance", momentum=self.options.momentum)

    def choose(self, epoch: int, scores: ScoreTable, random: Random) -> Selection:
        options = self.options
        again = (epoch - 1) % options.every != 0
        return plan(
            epoch,
            scores.value,
            scores.variance,
            random,
            ratio=options.ratio,
            width=options.width,
            anneal=self.anneal,
            before=self._selection if again else None,
        )

    def bounds(self, epoch: int) -> tuple[int, int]:
        size, anneal = self.size, self.anneal
        if epoch == 0 or self.idle or (anneal is not None and epoch >= anneal):
            return size, size
        keep = max(1, rounded(1 - self.options.ratio, size))
        return keep, keep
