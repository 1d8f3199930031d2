"""Quality against cost as plain data: every seed, each arm's mean, the front, labels that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final, final

from sparing.run.report.charts import SIDE, Label, axis, ticks
from sparing.run.report.words import prefix, significant

WIDTH, HEIGHT = 800.0, 380.0
"""Pixels of the plot on a wide screen, by which labels are placed."""
LETTER, LINE = 7.4, 18.0
COLOURS: Final = 6
WIDE: Final = 20.0
"""Costs further apart than this factor have a logarithmic axis."""
UNITS: Final = {"flops": "FLOP", "stored": "bytes"}
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """An arm: (cost, metric) of its mean and of each seed. ``number`` chooses its colour."""

    number: int
    name: str
    mean: tuple[float, float]
    seeds: list[tuple[float, float]]


@final
@dataclass(frozen=True, kw_only=True)
class Tag:
    """An arm's label at (x, y) percent, moved by (dx, dy) pixels."""

    x: float
    y: float
    dx: float
    dy: float
    number: int
    name: str
    style: str
    title: str
    outside: str = ""
    """Its metric, where it lies beyond the plot."""


@final
@dataclass(frozen=True, kw_only=True)
class Scatter:
    """What the template draws; percentages count from the left and from the top."""

    key: str
    unit: str
    title: str
    description: str
    paths: list[tuple[str, str]]
    x_ticks: list[Label]
    y_ticks: list[Label]
    tags: list[Tag]
    x_name: str


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks of a logarithmic axis from 10^low to 10^high: 1, 3, 10, 30, with their labels."""
    steps = (1, 3) if high - low < 4 else (1,)
    values = [s * 10.0**d for d in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    found = []
    for value in values:
        if low <= math.log10(value) <= high:
            size, sign = prefix(value)
            found.append((value, f"{significant(value / size, 4)} {sign}".rstrip()))
    return found


def style(number: int) -> str:
    """The colour of the arm of that number; from the seventh on its lines are dashed."""
    return f"c{(number - 1) % COLOURS + 1}" + " dash" * ((number - 1) // COLOURS % 2)


def front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The arms that no other beats in both, by rising cost."""
    sign = -1 if higher_is_better else 1
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.mean[0], sign * p.mean[1])):
        if not kept or sign * point.mean[1] < sign * kept[-1].mean[1]:
            kept.append(point)
    return kept


def window(values: Sequence[float], higher_is_better: bool) -> tuple[float, float]:
    """The range of ``values`` without those so bad that the rest would be squeezed together."""
    sign = -1 if higher_is_better else 1
    scores = sorted(sign * v for v in values)
    middle = median(scores)
    most = middle + 3 * (middle - scores[0])
    kept = [sign * s for s in scores if s <= most] or list(values)
    return min(kept), max(kept)


def scatter(
    key: str, unit: str, title: str, points: Sequence[Point], *, metric: str, higher: bool
) -> Scatter | None:
    """Lay out the plot of one axis of cost; None without a point."""
    if not points:
        return None
    low, high = window([p.mean[1] for p in points], higher)
    inside = [p for p in points if low <= p.mean[1] <= high]
    ys = [y for p in inside for _, y in [p.mean, *p.seeds]]
    y0, y1 = _padded(min(ys), max(ys), 0.1)
    xs = [x for p in points for x, _ in [p.mean, *p.seeds]]
    decades = min(xs) > 0 and max(xs) > WIDE * min(xs)
    warped = math.log10 if decades else float
    x0, x1 = _padded(warped(min(xs)), warped(max(xs)), 0.1)

    def across(x: float) -> float:
        return (warped(x) - x0) / (x1 - x0)

    def down(y: float) -> float:
        return (y1 - y) / (y1 - y0)

    def dot(x: float, y: float) -> str:
        return f"M{round(SIDE * across(x), 1):g} {round(SIDE * down(y), 1):g}h0"

    best = front(inside, higher)
    line = "L".join(f"{SIDE * across(p.mean[0]):.1f} {SIDE * down(p.mean[1]):.1f}" for p in best)
    paths = [(f"M{line}", "front")] if len(best) > 1 else []
    for p in inside:
        colour = style(p.number).split()[0]
        paths.append(("".join(dot(x, y) for x, y in p.seeds), f"{colour} dots faint"))
    paths += [(dot(*p.mean), f"{style(p.number).split()[0]} dots bold") for p in inside]
    named = UNITS.get(unit, unit.replace("_", " "))
    size, x_name = axis(max(xs), named)
    if decades:
        size, x_name = 1.0, f"{named}, logarithmic"
    scaled = [(100 * across(p.mean[0]), 100 * min(1.0, max(0.0, down(p.mean[1])))) for p in points]
    seeds = [(100 * across(x), 100 * down(y)) for p in inside for x, y in p.seeds]
    corners = [(100 * across(p.mean[0]), 100 * down(p.mean[1])) for p in best]
    covered = [*seeds, *_along(corners)]
    said = ", ".join(
        f"{p.name} {significant(p.mean[1], 4)} at {significant(p.mean[0] / size, 3)}"
        for p in points
    )
    return Scatter(
        key=key,
        unit=unit,
        title=title,
        description=f"{metric} against {x_name}: {said}. Front: " + ", ".join(p.name for p in best),
        paths=paths,
        x_ticks=[
            Label(at=round(100 * across(v), 2), text=text, minor=i % 2 == 1)
            for i, (v, text) in enumerate(
                _decades(x0, x1)
                if decades
                else [(v, significant(v / size, 4)) for v in ticks(x0, x1, 6)]
            )
        ],
        y_ticks=[
            Label(at=round(100 * down(v), 2), text=significant(v, 4)) for v in ticks(y0, y1, 6)
        ],
        tags=_tags(points, scaled, {p.number for p in inside}, covered),
        x_name=x_name,
    )


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    room = share * (high - low) or abs(high) * 0.02 or 1.0
    return low - room, high + room


def _tags(
    points: Sequence[Point],
    at: Sequence[tuple[float, float]],
    inside: set[int],
    covered: Sequence[tuple[float, float]],
) -> list[Tag]:
    """Labels beside their points, each at the first place where it covers nothing before it.

    ``at`` and ``covered``, what labels must not hide, are in percent.
    """
    taken = [_box(x, y, 6) for x, y in at] + [_box(x, y, 3) for x, y in covered]
    tags = []
    for p, (x, y) in zip(points, at, strict=True):
        beyond = p.number not in inside
        text = significant(p.mean[1], 4)
        width = LETTER * (len(p.name) + 2 + (len(text) + 3) * beyond)
        dx, dy = _free(x * WIDTH / 100, y * HEIGHT / 100, width, taken)
        left, top = x * WIDTH / 100 + dx, y * HEIGHT / 100 + dy
        taken.append((left, top, left + width, top + LINE))
        tags.append(
            Tag(
                x=round(x, 2),
                y=round(y, 2),
                dx=round(dx),
                dy=round(dy),
                number=p.number,
                name=p.name,
                style=style(p.number),
                title=f"{p.name}: {text}",
                outside=text if beyond else "",
            )
        )
    return tags


def _free(x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[float, float]:
    """How far from its point, in pixels, a label of that width stands alone; else beside it."""
    places = [
        (side, rise - LINE / 2)
        for far in range(12)
        for rise in ((0.0,) if far == 0 else (-far * LINE * 0.8, far * LINE * 0.8))
        for side in (10.0, -width - 10.0)
    ]
    for dx, dy in places:
        left, top = x + dx, y + dy
        right, bottom = left + width, top + LINE
        if left < 0 or right > WIDTH + 90 or top < -10 or bottom > HEIGHT + 4:
            continue
        if not any(left < b[2] and b[0] < right and top < b[3] and b[1] < bottom for b in taken):
            return dx, dy
    return places[0]


def _box(x: float, y: float, half: float) -> Box:
    px, py = x * WIDTH / 100, y * HEIGHT / 100
    return px - half, py - half, px + half, py + half


def _along(corners: Sequence[tuple[float, float]], pieces: int = 60) -> list[tuple[float, float]]:
    """Points on the line through the corners."""
    return [
        (x0 + (x1 - x0) * i / pieces, y0 + (y1 - y0) * i / pieces)
        for (x0, y0), (x1, y1) in pairwise(corners)
        for i in range(pieces + 1)
    ]
