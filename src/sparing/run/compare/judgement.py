"""What a comparison of two arms found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparing.run.compare.intervals import Interval

Verdict = Literal["equivalent", "different", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the seeds say about an arm and its baseline. Differences are arm - baseline.

    ``n`` counts the common seeds; the means are over them. ``paired``, ``bootstrap`` and
    ``documents`` pair the common seeds, ``unpaired`` uses every seed of either. ``p_low`` and
    ``p_high`` belong to the two one-sided tests, None where the margin is unbounded. ``alpha``
    is the error rate of this look, and the intervals are at 1 - alpha. ``seeds_needed``, of an
    undecided comparison, is a total, None beyond ``power.MOST_SEEDS``.
    """

    n: int
    mean_arm: float
    mean_baseline: float
    paired: Interval | None = None
    unpaired: Interval | None = None
    bootstrap: Interval | None = None
    documents: Interval | None = None
    p_low: float | None = None
    p_high: float | None = None
    p_difference: float | None = None
    alpha: float
    verdict: Verdict | None = None
    why: str
    seeds_needed: int | None = None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return asdict(self)
