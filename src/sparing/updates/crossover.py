"""Up to how many lookups, and how many rows that occur, going by rows beats passes over a table.

The borders are data, crossover.json beside this file: ``benchmarks/cowclip_crossover.py`` measures
both forms over a map of tables and batches, and ``--fit`` writes the borders that lose least on it.
They are of a processor; an accelerator takes the same ones, which nobody has measured there.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Final

FORMAT: Final = 1


@cache
def borders() -> dict[str, tuple[tuple[float, float], ...]]:
    """By decision, "sorted" and "rows": pairs of rows of a table and the border there."""
    text = resources.files("sparing.updates").joinpath("crossover.json").read_text()
    found = json.loads(text)
    if found["format"] != FORMAT:
        raise ValueError(f"crossover.json has format {found['format']}, expected {FORMAT}")
    return {
        name: tuple((float(rows), float(border)) for rows, border in found[name])
        for name in ("sorted", "rows")
    }


def sorts(lookups: int, rows: int) -> bool:
    """Whether to sort so many ids; else they are counted into an array of all rows."""
    return lookups <= between(borders()["sorted"], rows) * rows


def by_rows(occurring: int, rows: int) -> bool:
    """Whether to read only the rows that occur; else the gradient of the whole table."""
    return occurring <= between(borders()["rows"], rows) * rows


def between(points: tuple[tuple[float, float], ...], rows: int) -> float:
    """The border for so many rows: linear in their logarithm, level outside of the map."""
    if rows <= points[0][0]:
        return points[0][1]
    for (low, a), (high, b) in pairwise(points):
        if rows <= high:
            share = math.log(rows / low) / math.log(high / low)
            return a + share * (b - a)
    return points[-1][1]
