"""A training set streamed through cleaning and gain: which of its samples are worth training on.

Qin et al., ECCV 2024, *Dataset Growth* (arXiv 2405.18347).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.core.select import rounded
from sparing.pool.choice import choose, generator, in_rounds
from sparing.pool.copies.groups import Pairs, pairs_of_lists, ranks, representatives
from sparing.pool.items import REASONS, UNLABELLED
from sparing.pool.neighbourhood import Neighbourhood
from sparing.pool.neighbours import neighbours
from sparing.pool.training.grown import Grown, projected
from sparing.pool.training.options import GrowthOptions
from sparing.pool.training.reading import content
from sparing.samples.gains import probabilities

VOTERS: Final = 20
"""Nearest neighbours that a label is judged by."""
SAME: Final = 1e-6
"""Cosine distance up to which rounding is all that tells two vectors apart."""
LEAST: Final = 1e-6
"""The least chance of a sample beside that of the highest gain, so that a count is exact."""
ROUNDS: Final = 4
"""In which a static part is drawn."""
_ORDER, _DRAW = 0, 1
_Rows = NDArray[np.float32]
_Ids = NDArray[np.int64]
Discount = Callable[[Any, Any], None]
"""Lowers gains (n,) in place by the samples of some places, which were drawn."""


def grow(
    vectors: Tensor,
    labels: Tensor | None,
    options: GrowthOptions,
    *,
    marks: NDArray[np.uint64] | None = None,
    seed: int = 0,
) -> Grown:
    """Clean samples, value what is left, and draw the part to train on.

    vectors: (N, d) float32, rows of length 1, in the data set's order; labels: (N,) int64 classes,
    needed to clean them and to arrive by class; marks: (N,) hashes of the contents, by which the
    copy that stays is chosen whatever the order of arrival; those of the vectors without them.
    """
    size = len(vectors)
    classes = np.full(size, UNLABELLED) if labels is None else labels.numpy().astype(np.int64)
    if options.arrival == "by class" and labels is None:
        raise RequestError("samples without labels cannot arrive by class; set another arrival")
    order = arrival(classes, options.arrival, seed)
    stream = _Stream(vectors.numpy()[order], options)
    marks = content(vectors) if marks is None else marks
    reasons, group = stream.cleaned(classes[order], marks[order])
    found = _Arrived(order)
    gains, discount_ = stream.gains(reasons == 0)
    return Grown(
        gains=found.back(gains),
        reasons=found.back(reasons),
        kept=found.back(drawn(gains, options, seed, discount_)),
        group=found.back(order[group]),
        arrived=np.argsort(order),
        view=projected(vectors),
        flops=stream.flops,
    )


def arrival(classes: _Ids, how: str, seed: int) -> _Ids:
    """The samples in their order of arrival, one of ``ARRIVALS``: (N,) -> (N,)."""
    if how == "shuffled":
        return generator(seed, _ORDER).permutation(classes.size)
    if how == "by class":
        return np.argsort(classes, kind="stable")
    return np.arange(classes.size)


def drawn(
    gains: _Rows, options: GrowthOptions, seed: int, discount_: Discount | None = None
) -> NDArray[np.uint8]:
    """The static choice, in proportion to gain: (N,), NaN where dropped -> (N,) of 0 and 1.

    Exactly ``round(keep * N)`` samples, or all that are not dropped where these are fewer; with
    ``discount_`` in rounds, in which those drawn lower the gains of their neighbours.
    """
    clean = ~np.isnan(gains)
    count = min(max(1, rounded(options.keep, gains.size)), int(clean.sum()))
    weights = np.full(gains.size, np.nan)
    weights[clean] = chances(gains[clean], options.rule)
    random = generator(seed, _DRAW)
    if discount_ is None:
        places = choose(weights, count, random).places
    else:
        lower_, least = discount_, LEAST * float(np.nanmax(weights))

        def lowered_(left: Any, drawn: _Ids) -> None:
            lower_(left, drawn)
            np.maximum(left, least, out=left)  # a NaN stays

        places = in_rounds(weights, count, random, ROUNDS, lowered_).places
    kept = np.zeros(gains.size, dtype=np.uint8)
    kept[places] = 1
    return kept


def chances(gains: _Rows, rule: str) -> NDArray[np.float64]:
    """What samples are drawn in proportion to: gains, as published clipped at the highest 1 %."""
    wide = (probabilities(gains) if rule == "published" else gains).astype(np.float64)
    top = float(wide.max(initial=0.0))
    return np.maximum(wide, LEAST * top) if top > 0 else np.ones(gains.size)


@final
class _Arrived:
    """Puts what was found in the order of arrival back into that of the data set."""

    def __init__(self, order: _Ids) -> None:
        self.order = order

    def back(self, found: NDArray[Any]) -> Any:
        put = np.empty_like(found)
        put[self.order] = found
        return put


@final
class _Stream:
    """Samples as they arrive, their neighbours, and what the products cost."""

    def __init__(self, rows: _Rows, options: GrowthOptions) -> None:
        self.rows, self.options = np.ascontiguousarray(rows), options
        self.flops = 0
        self._all: Neighbourhood | None = None

    def _near(self, members: _Ids, *, frozen: bool = False, keep: int = 10) -> Neighbourhood:
        """The neighbourhood of the rows ``members``, ascending, which keep their numbers."""
        near = Neighbourhood(
            neighbours(self.rows.shape[1], "exact"),
            k=self.options.k,
            keep=keep,
            frozen=frozen,
        )
        near.add_(members, self.rows[members])
        # each looks at those before it
        self.flops += members.size * members.size * self.rows.shape[1]
        return near

    def cleaned(self, classes: _Ids, marks: NDArray[np.uint64]) -> tuple[NDArray[np.uint8], _Ids]:
        """Reasons (n,) and the sample that stands for each (n,), in the order of arrival."""
        size, options = len(self.rows), self.options
        reasons, group = np.zeros(size, dtype=np.uint8), np.arange(size)
        if not options.cleans:
            return reasons, group
        ids = np.arange(size)
        self._all = self._near(ids, keep=VOTERS)
        table = self._all.table
        far, who = table.distances.astype(np.float32), table.who.astype(np.int64)
        if options.duplicates > 0:
            found = pairs_of_lists(ids, far, who, options.duplicates)
            group = representatives(found, ids, ranks(_agreement(found, classes), marks))
            same = _twins(found, group)
            reasons[group != ids] = REASONS.index("near copy")
            reasons[same] = REASONS.index("same content")
        if options.label_issues and (classes != UNLABELLED).any():
            from sparing.pool.label_issues import by_neighbours, judged_classes, label_issues

            known = judged_classes(classes)
            if known.size > 1:
                votes = by_neighbours(classes, far, who, known, groups=group)
                doubted = label_issues(classes, votes, known).issues & (reasons == 0)
                reasons[doubted] = REASONS.index("label issue")
        return reasons, group

    def gains(self, clean: NDArray[np.bool_]) -> tuple[_Rows, Discount | None]:
        """The gains (n,) in the order of arrival, NaN for those not clean, and how draws lower
        them: not by the published rule."""
        gains = np.full(clean.size, np.nan, dtype=np.float32)
        members = np.flatnonzero(clean)
        if self.options.rule == "random":
            gains[members] = 1
            return gains, None
        if self.options.rule == "published":
            near = self._near(members, frozen=True)
            gains[members] = near.gains()
            return gains, None
        near = self._all or self._near(np.arange(clean.size))
        near.leave_(np.flatnonzero(~clean))
        return near.discounting()


def _agreement(found: Pairs, classes: _Ids) -> NDArray[np.float64]:
    """How many of its copies, less those that do not, have each sample's label: (n,).

    Of copies that do not agree on their label, one with that of the most stays.
    """
    alike = np.where(classes[found.first] == classes[found.second], 1.0, -1.0)
    ends = np.concatenate([found.first, found.second])
    votes = np.bincount(ends, np.concatenate([alike, alike]), classes.size)
    return votes.astype(np.float64)


def _twins(found: Pairs, group: _Ids) -> _Ids:
    """Samples whose vector is that of what stands for them."""
    exact = found.distance <= SAME
    first, second = found.first[exact], found.second[exact]
    return np.concatenate([second[group[second] == first], first[group[first] == second]])
