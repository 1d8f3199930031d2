"""The margin: how large a difference from the baseline still counts as nothing lost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sparing.core.errors import RequestError

_SPELLING = re.compile(
    r"(?P<sign>\+\s*/?\s*-|±|\+|-)?\s*"
    r"(?P<number>(?:nan|inf(?:inity)?)\b|[+-]?[\d.,]+(?:e[+-]?\d+)?)\s*"
    r"(?P<percent>%)?\s*(?P<unit>.*)",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Margin:
    """The differences arm - baseline that count as equivalent: ``low`` < difference < ``high``.

    None leaves a side unbounded, which makes the question one of non-inferiority. Both are in
    units of the metric, or, where ``relative``, in percent of the size of the baseline's mean.

    Raises:
        RequestError: both sides unbounded, a side that is not finite, or zero not inside.
    """

    low: float | None
    high: float | None
    unit: str
    relative: bool = False

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise RequestError("a margin must be bounded on one side at least; got none")
        if self.low is not None and not -math.inf < self.low < 0:
            raise RequestError(f"a margin's low side must be below zero, got {self.low}")
        if self.high is not None and not 0 < self.high < math.inf:
            raise RequestError(f"a margin's high side must be above zero, got {self.high}")

    def bounds(self, baseline_mean: float) -> tuple[float, float]:
        """The two sides in units of the metric; infinite where unbounded.

        Raises:
            RequestError: the margin is relative and the baseline's mean is zero.
        """
        scale = 1.0
        if self.relative:
            scale = abs(baseline_mean) / 100.0
            if scale == 0.0:
                raise RequestError(
                    f"the margin {self} is relative to the baseline's mean, which is zero; "
                    'give it in units of the metric, such as "+-0.02 METRIC"'
                )
        low = -math.inf if self.low is None else self.low * scale
        high = math.inf if self.high is None else self.high * scale
        return low, high

    def __str__(self) -> str:
        unit = "%" if self.relative else f" {self.unit}"
        if self.low is None:
            return f"+{self.high:g}{unit}"
        if self.high is None:
            return f"{self.low:g}{unit}"
        if self.low == -self.high:
            return f"±{self.high:g}{unit}"
        return f"{self.low:g} to +{self.high:g}{unit}"


def parse_margin(text: str, metric: str, higher_is_better: bool) -> Margin:
    """The margin that ``text`` spells, for comparisons of ``metric``.

    ``"+-0.02 bits_per_byte"`` or ``"±0.02 bits_per_byte"`` asks for equivalence. A single sign
    asks for non-inferiority and names the worse side: ``"+0.02 bits_per_byte"`` where lower is
    better, ``"-0.5 accuracy"`` where higher is. ``"+-1%"`` is relative to the baseline's mean.

    Raises:
        RequestError: no unit, no sign, a second sign, zero, not a finite number, another
            metric, or a single side that is the metric's better one.
    """
    worse = "-" if higher_is_better else "+"
    right = (
        f'write "+-0.02 {metric}" for equivalence, "{worse}0.02 {metric}" for no worse than, '
        'or "+-1%" of the baseline\'s mean'
    )
    shown = f'margin "{text}"'
    found = _SPELLING.fullmatch(text.strip().replace("\u2212", "-")) if _is_text(text) else None
    if found is None:
        raise RequestError(f"{shown} is not a sign, a number and a unit; {right}")
    sign, number, unit = found["sign"], found["number"], found["unit"].strip()
    if sign is None:
        raise RequestError(f"{shown} has no sign; {right}")
    if number[0] in "+-":
        raise RequestError(f"{shown} has one sign too many; {right}")
    size = _number(number)
    if not 0 < size < math.inf:
        raise RequestError(f"{shown} must be a finite number above zero; {right}")
    if found["percent"] and unit:
        raise RequestError(
            f"{shown} could mean percent of the baseline's mean or points of the metric; {right}"
        )
    if not found["percent"] and not unit:
        raise RequestError(f"{shown} has no unit; {right}")
    if not found["percent"] and unit != metric:
        raise RequestError(f'{shown} is in "{unit}", and the comparison in "{metric}"; {right}')
    both = sign not in ("+", "-")
    if not both and sign != worse:
        better = "higher" if higher_is_better else "lower"
        raise RequestError(
            f"{shown} bounds the better side, and {better} {metric} is better, which needs no "
            f"margin; {right}"
        )
    return Margin(
        low=-size if both or sign == "-" else None,
        high=size if both or sign == "+" else None,
        unit="%" if found["percent"] else metric,
        relative=bool(found["percent"]),
    )


def _is_text(text: object) -> bool:
    # Recipes are YAML, where a margin without unit arrives as a number.
    return isinstance(text, str)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
