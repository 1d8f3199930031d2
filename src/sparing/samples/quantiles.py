"""Strata by loss, each with its own share to keep: InfoBatch with more than one border.

From the variants of InfoBatch (Qin et al., arXiv 2303.04947) that its authors train ImageNet with:
borders at percentiles 20 and 85, of which 25 % and 50 % are kept, and all above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number
from sparing.core.errors import RequestError
from sparing.samples.annealing import Annealed
from sparing.samples.draw import LEFT_OUT, Random, rounded, thin_
from sparing.samples.options import SelectionOptions
from sparing.samples.scores import ScoreTable
from sparing.samples.selection import Selection, chosen, everything


def counts_of(size: int, borders: Sequence[float], keep: Sequence[float]) -> list[tuple[int, int]]:
    """(samples, kept) of each stratum: cut at ``round(border * size)``; none is emptied."""
    ends = [0, *(rounded(border, size) for border in borders), size]
    strata = [high - low for low, high in pairwise(ends)]
    return [
        (have, min(have, max(1, rounded(share, have))))
        for have, share in zip(strata, keep, strict=True)
    ]


def plan(
    epoch: int,
    scores: NDArray[np.float32],
    random: Random,
    *,
    borders: Sequence[float],
    keep: Sequence[float],
    anneal: int | None = None,
) -> Selection:
    """The samples and weights of an epoch, counted from 0.

    scores: (N,), NaN where unknown, which counts as the highest. The lowest ``round(borders[0] *
    N)`` samples are the first stratum and so on, exactly; equal scores at a border are told apart
    by lot. Of a stratum of n_g, ``round(keep[g] * n_g)`` are kept and weigh n_g / kept, so that the
    sum of weighted gradients over the epoch is unbiased.
    """
    size = scores.size
    if (anneal is not None and epoch >= anneal) or np.isnan(scores).all():
        return everything(size, random)
    code = np.full(size, len(keep), dtype=np.uint8)
    filled = np.where(np.isnan(scores), np.float32(np.inf), scores)
    strata = counts_of(size, borders, keep)
    ends = np.cumsum([have for have, _ in strata])[:-1]
    inner = sorted({int(end) for end in ends if 0 < end < size})
    parted = np.partition(filled, [end - 1 for end in inner]) if inner else filled
    for group in range(len(ends), 0, -1):  # from the top, so that lower strata take over
        end = int(ends[group - 1])
        if end == 0:
            continue
        border = parted[end - 1] if end < size else np.inf
        code[filled < border] = group
        here = int(np.count_nonzero(filled < border))
        # of equal ones, a lower stratum takes among those that the one above has left to it
        equal = np.flatnonzero((filled == border) & (code == group + 1))
        take = np.ones(equal.size, dtype=np.uint8)
        thin_(take, 1, end - here, random)
        code[equal[take == 1]] = group
    weights = [0.0]
    for group, (have, kept) in enumerate(strata, start=1):
        thin_(code, group, kept, random)
        weights.append(have / kept if kept else 1.0)
    return chosen(code, random, weights)


@final
@dataclass(frozen=True, kw_only=True)
class QuantilesOptions(SelectionOptions):
    """Options of quantiles.

    borders: rising shares of the samples by loss, in (0, 1). keep: the share kept of each stratum,
    one more than borders, in (0, 1]. delta: share of the epochs that choose; the rest are full.
    """

    borders: Sequence[float] = (0.2, 0.85)
    keep: Sequence[float] = (0.25, 0.5, 1.0)
    delta: float = 0.875

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("delta", self.delta, 0, 1)
        for name in ("borders", "keep"):
            for value in getattr(self, name):
                require_number(name, value, 0, 1)
            object.__setattr__(self, name, tuple(getattr(self, name)))
        inside = all(0 < border < 1 for border in self.borders)
        if not inside or list(self.borders) != sorted(set(self.borders)):
            raise RequestError(f"borders must rise within (0, 1), got {self.borders}")
        if len(self.keep) != len(self.borders) + 1 or len(self.keep) >= LEFT_OUT:
            raise RequestError(
                f"{len(self.borders)} borders make {len(self.borders) + 1} strata; keep must have "
                f"a share for each, got {self.keep}"
            )
        if min(self.keep) <= 0:
            raise RequestError(f"each share in keep must be above 0, got {self.keep}")


@final
class Quantiles(Annealed):
    """Keeps a share of each stratum of the losses, and weighs it up."""

    name: ClassVar[str] = "quantiles"
    Options = QuantilesOptions
    identity: ClassVar[Mapping[str, Any]] = {"borders": [0.5], "keep": [1.0, 1.0]}

    @property
    def idle(self) -> bool:
        return all(share == 1 for share in self.options.keep)

    def choose(self, epoch: int, scores: ScoreTable, random: Random) -> Selection:
        options = self.options
        return plan(
            epoch,
            scores.value,
            random,
            borders=options.borders,
            keep=options.keep,
            anneal=self.anneal,
        )

    def bounds(self, epoch: int) -> tuple[int, int]:
        size, anneal = self.size, self.anneal
        if epoch == 0 or self.idle or (anneal is not None and epoch >= anneal):
            return size, size
        kept = sum(kept for _, kept in counts_of(size, self.options.borders, self.options.keep))
        return kept, kept
