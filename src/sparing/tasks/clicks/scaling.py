"""Numbers as a network takes them: near zero, about one wide, and never missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.tasks.clicks.columns import arrow, floats

Rule = Literal["standard", "log", "none"]
RULES = ("standard", "log", "none")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """``(f(x) - mean) / deviation``, and 0 where x is missing.

    ``f`` is x itself, or sign(x) log(1 + abs(x)) for ``log``, which suits counts; with ``none``
    numbers stay as they are.
    """

    name: str
    rule: Rule
    mean: float = 0.0
    deviation: float = 1.0
    missing: int = 0

    def apply(self, column: Any) -> NDArray[np.float32]:
        """(n,) float32 of an arrow array, numpy array or list. Raises Misplaced for infinities."""
        values = _bent(floats(arrow(column), self.name), self.rule)
        if self.rule != "none":
            values -= self.mean
            values /= self.deviation
        np.nan_to_num(values, copy=False, nan=0.0)
        return values.astype(np.float32)


@final
class Moments:
    """Mean and standard deviation of a column over a stream of batches.

    Batches are joined by Chan, Golub and LeVeque's formula (1979), which does not cancel.
    """

    def __init__(self, name: str, rule: Rule = "standard") -> None:
        if rule not in RULES:
            raise RequestError(f'numbers are scaled by {", ".join(RULES)}, got "{rule}"')
        self.name, self.rule = name, rule
        self.count = self.missing = 0
        self.mean = self.squares = 0.0

    def add(self, column: Any) -> None:
        """Take in one batch. Raises Misplaced for infinities."""
        values = _bent(floats(arrow(column), self.name), self.rule)
        values = values[~np.isnan(values)]
        self.missing += len(column) - len(values)
        if not len(values):
            return
        mean = float(values.mean())
        squares = float(np.square(values - mean).sum())
        total = self.count + len(values)
        apart = mean - self.mean
        self.squares += squares + apart * apart * self.count * len(values) / total
        self.mean += apart * len(values) / total
        self.count = total

    def scale(self) -> Scale:
        """What the batches give; a constant column is only shifted."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        flat = deviation <= 1e-12 * abs(self.mean)
        return Scale(
            name=self.name,
            rule=self.rule,
            mean=self.mean,
            deviation=1.0 if flat else deviation,
            missing=self.missing,
        )


def _bent(values: NDArray[np.float64], rule: Rule) -> NDArray[np.float64]:
    if rule != "log":
        return values.copy()
    bent: NDArray[np.float64] = np.copysign(np.log1p(np.abs(values)), values)
    return bent
