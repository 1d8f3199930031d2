"""Full epochs at the end, which let samples that were left out be seen again."""

from __future__ import annotations

import math
from fractions import Fraction

from sparing.samples.method import SampleSelection


def annealing(delta: float, epochs: int) -> int:
    """The first full epoch of the end: ``ceil(delta * epochs)``, in exact decimal arithmetic."""
    return math.ceil(Fraction(str(delta)) * epochs)


class Annealed(SampleSelection):
    """Abstract: chooses in the first share ``options.delta`` of the epochs; the rest are full."""

    @property
    def anneals(self) -> bool:
        return bool(self.options.delta < 1)

    @property
    def anneal(self) -> int | None:
        """The first full epoch of the end; None: there is none."""
        return annealing(self.options.delta, self.epochs) if self.anneals else None
