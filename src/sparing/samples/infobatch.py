"""InfoBatch: leave out a random part of the samples that are learned already, weigh up the rest.

Qin et al., ICLR 2024 (arXiv 2303.04947), section 3: of the samples whose loss is below the mean, a
share ``ratio`` is left out at random, and those kept weigh 1 / (1 - ratio); all others stay. The
first epoch and the last ones are full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number
from sparing.core.errors import RequestError
from sparing.samples.annealing import Annealed
from sparing.samples.draw import Random, rounded, thin_
from sparing.samples.options import SelectionOptions
from sparing.samples.scores import ScoreTable, mean_of
from sparing.samples.selection import Selection, chosen, everything

BELOW, ABOVE = 1, 2


def plan(
    epoch: int,
    scores: NDArray[np.float32],
    random: Random,
    *,
    ratio: float,
    anneal: int | None = None,
    rescale: bool = True,
) -> Selection:
    """The samples and weights of an epoch, counted from 0.

    scores: (N,), NaN where unknown; such samples are kept. A score counts as low if it is strictly
    below the mean of those known. Exactly ``round((1 - ratio) * n1)`` of the n1 low ones are kept,
    at least one, and each weighs exactly n1 / kept, so that the sum of weighted gradients over the
    epoch is unbiased; without ``rescale`` it weighs 1. Epochs from ``anneal`` on, and while no
    score is known, are full.
    """
    if anneal is not None and epoch >= anneal:
        return everything(scores.size, random)
    mean = mean_of(scores)
    code = (scores < mean).view(np.uint8)
    np.subtract(np.uint8(ABOVE), code, out=code)
    low = scores.size - int(np.count_nonzero(code == ABOVE))
    if ratio == 0 or low == 0:
        return everything(scores.size, random)
    keep = max(1, rounded(1 - ratio, low))
    thin_(code, BELOW, keep, random)
    return chosen(code, random, [0.0, low / keep, 1.0] if rescale else None)


def check_ratio(ratio: object) -> None:
    """Raise RequestError unless ``ratio`` is a number in [0, 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise RequestError(f"ratio, the share that is left out, must be in [0, 1), got {ratio!r}")


@final
@dataclass(frozen=True, kw_only=True)
class InfoBatchOptions(SelectionOptions):
    """Options of InfoBatch.

    ratio: share of the well learned samples that an epoch leaves out, in [0, 1). delta: the share
    of the epochs that choose; the rest, from ``ceil(delta * epochs)`` on, are full. rescale: weigh
    up the samples that stand for others; without, gradients lean toward what is hard.
    """

    ratio: float = 0.5
    delta: float = 0.875
    rescale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)
        require_number("delta", self.delta, 0, 1)


@final
class InfoBatch(Annealed):
    """Leaves out a random part of the samples with a loss below the mean; weighs up the rest."""

    name: ClassVar[str] = "infobatch"
    Options = InfoBatchOptions
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}

    @property
    def idle(self) -> bool:
        return bool(self.options.ratio == 0)

    def choose(self, epoch: int, scores: ScoreTable, random: Random) -> Selection:
        o = self.options
        return plan(
            epoch, scores.value, random, ratio=o.ratio, anneal=self.anneal, rescale=o.rescale
        )

    def bounds(self, epoch: int) -> tuple[int, int]:
        size, anneal = self.size, self.anneal
        if epoch == 0 or self.idle or (anneal is not None and epoch >= anneal) or size == 1:
            return size, size
        low = size - 1  # all but one can be below the mean
        return size - (low - max(1, rounded(1 - self.options.ratio, low))), size
