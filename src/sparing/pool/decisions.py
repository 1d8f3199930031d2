"""A decision about items of the pool: which, why, and examples that a person can look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError, unknown
from sparing.pool.items import REASONS


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One item decided about; ``other`` the id of the item it was compared with, -1 for none."""

    id: int
    detail: str
    other: int = -1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The items ``ids`` (n,) get ``reason``, one of REASONS; ``detail`` says by what rule.

    ``before`` (n,) holds the reasons that they had, as positions in REASONS: writing these back
    takes the decision back. A decision changes nothing by itself.
    """

    reason: str
    ids: NDArray[np.int64]
    before: NDArray[np.int64]
    detail: str = ""
    examples: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise unknown("reason", self.reason, REASONS)
        if self.ids.shape != self.before.shape or self.ids.ndim != 1:
            raise RequestError(
                f"a decision needs the former reason of each item, got {self.before.shape} for "
                f"{self.ids.shape}"
            )

    @property
    def values(self) -> NDArray[np.int64]:
        """(n,) what to write as the items' reasons."""
        return np.full(len(self.ids), REASONS.index(self.reason), np.int64)

    def undone(self, now: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ids, reasons) that take it back, given the reasons (n,) that its items have now.

        Items that a later decision gave another reason are left out: that one stands.
        """
        still = np.asarray(now) == REASONS.index(self.reason)
        return self.ids[still], self.before[still]


def decide(
    reason: str,
    ids: NDArray[np.int64],
    before: NDArray[np.integer[Any]],
    mask: NDArray[np.bool_],
    *,
    detail: str,
    scores: NDArray[np.floating[Any]],
    words: str,
    told: Mapping[str, NDArray[Any]] | None = None,
    others: NDArray[np.int64] | None = None,
    examples: int = 12,
) -> Decision:
    """The decision on ``ids[mask]`` that are kept now; examples are spread over their scores.

    words: of an example, with its score as ``{score:.3f}``, and what ``told`` has of each item by
    its name. From the highest score to the lowest at
    even steps: the plainest cases alone would make any rule look right.
    """
    hit = np.flatnonzero(np.asarray(mask) & (np.asarray(before) == 0))
    order = hit[np.argsort(-np.asarray(scores)[hit], kind="stable")]
    steps = np.unique(np.linspace(0, len(order) - 1, min(examples, len(order))).astype(int))
    shown: Sequence[int] = order[steps].tolist() if len(order) else []
    return Decision(
        reason=reason,
        ids=np.asarray(ids, np.int64)[hit],
        before=np.asarray(before, np.int64)[hit],
        detail=detail,
        examples=tuple(
            Example(
                id=int(ids[at]),
                detail=words.format(
                    score=float(scores[at]), **{name: v[at] for name, v in (told or {}).items()}
                ),
                other=-1 if others is None else int(others[at]),
            )
            for at in shown
        ),
    )
