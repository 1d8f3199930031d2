"""Line charts as plain data: a stretched SVG for what is drawn, percentages for what is written.

The SVG fills its box at any width (`preserveAspectRatio="none"`, strokes that do not scale) and
all text is HTML placed over it in percent, so letters keep their size from a phone to a wide
screen. Colours are class names; the style sheet gives them values for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

from sparing.run.report.read import Points
from sparing.run.report.words import prefix, significant

SIDE = 1000
"""Units of the SVG's view box, both ways."""
WRAP = 15
"""A longer label beside a chart stands in two lines."""


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """A series: ``points`` joined by a line, by steps, or left as ``dots``."""

    points: Points
    style: str
    label: str = ""
    dots: bool = False
    steps: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Mark:
    """An event at (x, y): ``style`` gives the shape, ``text`` says what happened."""

    x: float
    y: float
    style: str
    text: str


@final
@dataclass(frozen=True, kw_only=True)
class Label:
    """A text at ``at`` percent of an axis. ``minor`` ones give way where the chart is narrow."""

    at: float
    text: str
    style: str = ""
    minor: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Chart:
    """What the template draws. Percentages count from the left and from the top."""

    key: str
    title: str
    description: str
    paths: list[tuple[str, str]]
    """(path data, style)"""
    x_ticks: list[Label] = field(default_factory=list)
    y_ticks: list[Label] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    marks: list[tuple[float, float, str, str]] = field(default_factory=list)
    x_name: str = ""
    note: Label | None = None
    """Said at the top, where the line enters."""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Points, most: int = 240) -> Points:
    """At most ``most`` points, each the mean of its share of the run; the last one is kept."""
    if len(points) <= most:
        return list(points)
    cut = [round(i * len(points) / most) for i in range(most + 1)]
    means = [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in (points[a:b] for a, b in pairwise(cut))
    ]
    return [*means[:-1], (points[-1][0], means[-1][1])]


def smooth(points: Points, share: float = 0.04) -> Points:
    """A centred running mean over ``share`` of the points, of what there is at both ends."""
    sums, n = [0.0], len(points)
    for _, y in points:
        sums.append(sums[-1] + y)
    half = int(n * share / 2)
    result = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - half), min(n, i + half + 1)
        result.append((x, (sums[high] - sums[low]) / (high - low)))
    return result


def spread(at: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres ``at`` (percent) moved as little as it takes for ``heights`` not to overlap.

    They stay inside [0, 100] as long as they fit.
    """
    # Each group of touching labels is centred on the mean of what its members asked for.
    groups: list[list[int]] = []
    centre: list[float] = []

    def size(group: list[int]) -> float:
        return sum(heights[i] for i in group)

    for i in sorted(range(len(at)), key=lambda i: at[i]):
        groups.append([i])
        centre.append(at[i])
        while (
            len(groups) > 1 and centre[-1] - centre[-2] < (size(groups[-1]) + size(groups[-2])) / 2
        ):
            last = groups.pop()
            centre.pop()
            groups[-1] += last
            first, final = heights[groups[-1][0]] / 2, heights[last[-1]] / 2
            low, high = size(groups[-1]) / 2 - first, 100 - size(groups[-1]) / 2 + final
            centre[-1] = max(low, min(high, sum(at[j] for j in groups[-1]) / len(groups[-1])))
    result = [0.0] * len(at)
    for members, middle in zip(groups, centre, strict=True):
        top = middle - size(members) / 2
        for i in members:
            result[i] = round(top + heights[i] / 2, 2)
            top += heights[i]
    return result


def chart(
    key: str,
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    rules: Sequence[tuple[float, str, str]] = (),
    marks: Sequence[Mark] = (),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_name: str = "",
    x_scale: float = 1.0,
    x_about: int = 5,
    y_about: int = 5,
    gap: float = 6.5,
    note: tuple[float, str] | None = None,
) -> Chart | None:
    """Lay out ``lines`` and horizontal ``rules`` (value, style, label); None without a point.

    ``x_scale`` divides the numbers written at the x axis; ``gap`` is the height of a label in
    percent of the chart's; ``note`` is (x, text), written at the top.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [value for value, _, _ in rules]
    if not xs:
        return None
    x0, x1 = x_range or (min(xs), max(xs))
    y0, y1 = y_range or (min(ys), max(ys))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def across(x: float) -> float:
        return (x - x0) / (x1 - x0)

    def down(y: float) -> float:
        return (y1 - y) / (y1 - y0)

    paths, wanted = [], []
    for value, style, label in rules:
        y = round(SIDE * down(value))
        paths.append((f"M0 {y}H{SIDE}", f"rule {style}"))
        wanted.append((value, style, label))
    for line in lines:
        place = [(round(SIDE * across(x), 1), round(SIDE * down(y))) for x, y in line.points]
        if place:
            style = f"{line.style} dots" if line.dots else line.style
            paths.append((_path(place, line), style))
            if line.label:
                wanted.append((line.points[-1][1], line.style, line.label))
    places = spread(
        [100 * min(1.0, max(0.0, down(v))) for v, _, _ in wanted],
        [gap * (1 if len(text) <= WRAP else 1.8) for _, _, text in wanted],
    )
    return Chart(
        key=key,
        title=title,
        description=description,
        paths=paths,
        x_ticks=_labels(ticks(x0, x1, x_about), x_scale, across),
        y_ticks=_labels(ticks(y0, y1, y_about), 1.0, down),
        labels=[
            Label(at=at, text=text, style=style)
            for at, (_, style, text) in zip(places, wanted, strict=True)
        ],
        marks=[
            (round(100 * across(m.x), 2), round(100 * down(m.y), 2), m.style, m.text) for m in marks
        ],
        x_name=x_name,
        note=Label(at=round(100 * across(note[0]), 2), text=note[1]) if note else None,
    )


def axis(largest: float, unit: str) -> tuple[float, str]:
    """The scale and the name of an axis that ends at ``largest``: (1e6, "tokens, millions")."""
    size, sign = prefix(largest)
    if unit == "FLOP":
        return size, f"{sign}FLOP"
    words = {"k": "thousands", "M": "millions", "G": "billions", "T": "trillions"}
    return size, f"{unit}, {words[sign]}" if sign in words else unit


def _labels(values: list[float], scale: float, place: Callable[[float], float]) -> list[Label]:
    return [
        Label(at=round(100 * place(v), 2), text=significant(v / scale, 4), minor=i % 2 == 1)
        for i, v in enumerate(values)
    ]


def _path(place: list[tuple[float, int]], line: Line) -> str:
    if line.dots:  # a line of no length with round ends is a dot that stretching leaves round
        return "".join(f"M{x:g} {y}h0" for x, y in place)
    (x, y), rest = place[0], place[1:]
    if line.steps:
        return f"M{x:g} {y}" + "".join(f"H{x:g}V{y}" for x, y in rest)
    if not rest:
        return f"M{x:g} {y}h0"
    return f"M{x:g} {y}L" + " ".join(f"{x:g} {y}" for x, y in rest)
