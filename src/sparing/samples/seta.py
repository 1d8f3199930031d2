"""SeTa: clusters of samples by loss, of which a window slides from easy to hard.

Zhou et al., CVPR 2025 (arXiv 2503.13385). The clusters here are optimal, not from a random start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.samples import clusters
from sparing.samples.annealing import Annealed
from sparing.samples.draw import LEFT_OUT, Random, rounded, thin_
from sparing.samples.infobatch import check_ratio
from sparing.samples.options import SelectionOptions
from sparing.samples.random import plan as at_random
from sparing.samples.scores import ScoreTable
from sparing.samples.selection import Selection, chosen, everything


def plan(
    epoch: int,
    scores: NDArray[np.float32],
    random: Random,
    *,
    ratio: float,
    groups: int,
    window: float,
    anneal: int | None = None,
) -> Selection:
    """The samples of an epoch, counted from 0, all with weight 1.

    scores: (N,), NaN where unknown; such samples are kept if drawn. ``round((1 - ratio) * N)``
    samples are drawn at random and clustered by score into ``groups``; kept are the ``round(groups
    * window)`` neighbouring clusters from ``epoch mod (groups - that + 1)`` on, easiest first.
    Epochs from ``anneal`` on, and the first, take all that are drawn.
    """
    keep = max(1, rounded(1 - ratio, scores.size))
    if epoch == 0 or (anneal is not None and epoch >= anneal) or np.isnan(scores).all():
        return at_random(scores.size, random, keep=keep)
    drawn = np.ones(scores.size, dtype=np.uint8)
    thin_(drawn, 1, keep, random)
    known = (drawn == 1) & ~np.isnan(scores)
    if not known.any():
        return chosen(drawn, random)
    cuts = clusters.borders(scores[known], groups)
    found = cuts.size + 1  # fewer where there are fewer distinct scores
    wide = min(found, max(1, round(groups * window)))
    start = epoch % (found - wide + 1)
    label = clusters.labels(scores, cuts)
    inside = (label >= start) & (label < start + wide)
    code = ((drawn == 1) & (inside | np.isnan(scores))).view(np.uint8)
    return chosen(code, random) if code.any() else everything(scores.size, random)


@final
@dataclass(frozen=True, kw_only=True)
class SeTaOptions(SelectionOptions):
    """Options of SeTa.

    ratio: share left out at random before anything else, in [0, 1). groups: clusters by loss.
    window: the share of the clusters that an epoch takes, in (0, 1]. delta: share of the epochs
    with a window; the rest take a random part.
    """

    ratio: float = 0.0
    groups: int = 10
    window: float = 0.5
    delta: float = 0.875

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)
        require_whole("groups", self.groups, 1)
        if self.groups >= LEFT_OUT:
            raise RequestError(f"groups must be below {LEFT_OUT}, got {self.groups}")
        require_number("window", self.window, 0, 1)
        if self.window == 0:
            raise RequestError("window must be above 0; it is the share of clusters to take")
        require_number("delta", self.delta, 0, 1)


@final
class SeTa(Annealed):
    """Takes a sliding window of the clusters of samples by loss; biased by design."""

    name: ClassVar[str] = "seta"
    Options = SeTaOptions
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0, "window": 1.0}

    @property
    def idle(self) -> bool:
        return bool(self.options.ratio == 0 and self.options.window == 1)

    def choose(self, epoch: int, scores: ScoreTable, random: Random) -> Selection:
        o = self.options
        return plan(
            epoch,
            scores.value,
            random,
            ratio=o.ratio,
            groups=o.groups,
            window=o.window,
            anneal=self.anneal,
        )

    def bounds(self, epoch: int) -> tuple[int, int]:
        keep, anneal = max(1, rounded(1 - self.options.ratio, self.size)), self.anneal
        if epoch == 0 or self.idle or (anneal is not None and epoch >= anneal):
            return keep, keep
        return 1, self.size
