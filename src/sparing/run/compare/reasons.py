"""Sentences that say why a comparison has its verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparing.run.compare.distributions import spread_range
from sparing.run.compare.intervals import Interval
from sparing.run.compare.margin import Margin
from sparing.run.compare.power import MOST_SEEDS


@dataclass(frozen=True, kw_only=True)
class Reasons:
    """The margin (``low``, ``high``) that the verdict is about, and the unit to write after it."""

    low: float
    high: float
    unit: str

    def equivalent(
        self,
        interval: Interval,
        p_low: float | None,
        p_high: float | None,
        p_difference: float,
    ) -> str:
        """Why the verdict is "equivalent"; ``interval`` is at 1 - 2 alpha."""
        alpha = (1.0 - interval.level) / 2.0
        p = [value for value in (p_low, p_high) if value is not None]
        tests = "both one-sided tests reject" if len(p) == 2 else "the one-sided test rejects"
        sentence = (
            f"the {_percent(interval.level)} interval of the difference, {self._range(interval)}, "
            f"lies inside the margin {self._margin()}: {tests} at {_percent(alpha)} "
            f"({' and '.join(map(_p, p))})"
        )
        if p_difference > alpha:
            return sentence
        sentence += (
            f"; the difference {interval.estimate:+.4g}{self.unit} is not zero ({_p(p_difference)})"
        )
        if p_low is not None and p_high is not None:
            return f"{sentence}, but smaller than the margin"
        better = (interval.estimate > 0) == (p_low is not None)
        return f"{sentence}, on the better side" if better else f"{sentence}, but within the margin"

    def different(self, interval: Interval, p_difference: float) -> str:
        """Why the verdict is "different"; ``interval`` is at 1 - alpha."""
        inside = self.low < interval.estimate < self.high
        where = "inside, but not shown to be," if inside else "outside"
        return (
            f"the difference {interval.estimate:+.4g}{self.unit} is not zero at "
            f"{_percent(1.0 - interval.level)} ({_p(p_difference)}, {_percent(interval.level)} "
            f"interval {self._range(interval)}), and it lies {where} the margin {self._margin()}"
        )

    def undecided(self, interval: Interval, power: float, seeds: int | None) -> str:
        """Why the verdict is "undecided"; ``interval`` is at 1 - 2 alpha."""
        wanted = f"more than {MOST_SEEDS:,}" if seeds is None else f"{seeds:,}"
        return (
            f"the {_percent(interval.level)} interval of the difference, {self._range(interval)}, "
            f"is not inside the margin {self._margin()}, and no difference from zero is shown; "
            f"{wanted} seeds in all would decide it with probability {_percent(power)}, if the "
            "true difference and spread are the observed ones"
        )

    def _range(self, interval: Interval) -> str:
        return f"{interval.low:+.4g} to {interval.high:+.4g}{self.unit}"

    def _margin(self) -> str:
        return _margin(self.low, self.high)


def spread_note(n: int, level: float) -> str:
    """How little ``n`` seeds say about the spread that the number of seeds needed rests on."""
    low, high = spread_range(n - 1, (1.0 - level) / 2.0)
    return (
        f"the number of seeds needed rests on a spread estimated from {n} seeds, and the true one "
        f"lies between {1 / high:.2g} and {1 / low:.2g} times that ({_percent(level)} interval); "
        "the number grows with its square"
    )


def margin_note(margin: Margin, low: float, high: float, mean: float) -> str:
    """What a relative margin is in units of the metric."""
    return (
        f"the margin {margin} is one {_margin(low, high)} at the baseline's mean {mean:.5g}, "
        "which is taken as known"
    )


def _margin(low: float, high: float) -> str:
    if low == -math.inf:
        return f"of at most {high:+.4g}"
    if high == math.inf:
        return f"of at least {low:+.4g}"
    return f"of {low:+.4g} to {high:+.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _p(value: float) -> str:
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"
