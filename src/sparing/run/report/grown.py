"""How a training set grew: what became of each sample, a map of them, and gain by arrival."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from sparing.run.report.charts import Chart, Line, chart
from sparing.run.report.read import Points, Run, number
from sparing.run.report.words import DASH, percent, visible

KEPT: Final = "kept"
LEFT: Final = -1
"""Of a point: clean, and not trained on."""
COPIES: Final = ("same content", "near copy")
DOUBTED: Final = "label issue"
STYLES: Final[Mapping[str, str]] = {
    "trained on": "c1",
    "left out": "grid-dots",
    "copies": "c2",
    DOUBTED: "c4",
    "other reasons": "c3",
}


def grown(run: Run) -> dict[str, Any] | None:
    """What the section shows, None where no method grew the training set.

    The page's ``growth`` is of ``sparing.pool.training.page``, its ``planted`` {copies: groups of
    ids, wrong: ids} of a task that put them there.
    """
    given = run.page.get("growth")
    size = number(given.get("size")) if isinstance(given, dict) else None
    if not size:
        return None
    assert isinstance(given, dict)
    reasons = {visible(str(k)): int(number(v) or 0) for k, v in given["reasons"].items()}
    trained = int(number(given.get("trained")) or 0)
    rows = [("trained on", trained)]
    rows += [("clean, left out", reasons.get(KEPT, 0) - trained)]
    rows += [(f"dropped: {name}", count) for name, count in reasons.items() if name != KEPT]
    return {
        "size": f"{int(size):,}",
        "trained": f"{trained:,}",
        "share": percent(trained / size),
        "rows": [(name, f"{count:,}", percent(count / size)) for name, count in rows],
        "found": found(given, run.page.get("planted") or {}),
        "map": _map(given.get("points") or [], list(given.get("names") or [])),
        "legend": STYLES,
        "tenths": _tenths(given.get("tenths") or []),
    }


def found(given: Mapping[str, Any], planted: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows (what, planted, found, precision, recall) of what a task had put there.

    Copies are counted in pairs: two of one group. Of wrong labels those whose sample was dropped as
    a copy were not there to be found, and the last row tells how many were trained on.
    """
    each, names = given.get("each") or {}, list(given.get("names") or [])
    told = str(each.get("reasons") or "")
    if not told or not planted:
        return []
    rows = []
    if planted.get("copies"):
        mine = _owner(each.get("copies") or [])
        true = _owner(planted["copies"])
        both = Counter((true[i], mine[i]) for i in true.keys() & mine.keys())
        rows.append(
            _row("pairs of copies", _pairs(true.values()), _pairs(mine.values()),
                 sum(n * (n - 1) // 2 for n in both.values()))
        )  # fmt: skip
    wrong = set(planted.get("wrong") or [])
    if wrong:
        reason = [names[int(digit)] for digit in told]
        seen = {i for i in wrong if reason[i] not in COPIES}
        doubted = {i for i, name in enumerate(reason) if name == DOUBTED}
        if doubted:
            rows.append(_row("wrong labels", len(seen), len(doubted), len(seen & doubted)))
        trained = {i for i, digit in enumerate(str(each.get("trained") or "")) if digit == "1"}
        among = len(wrong & trained)
        rows.append(
            (
                "wrong labels among those trained on",
                f"{len(wrong):,} ({percent(len(wrong) / len(told))} of all)",
                f"{among:,} ({percent(among / max(1, len(trained)))})",
                DASH,
                DASH,
            )
        )
    return rows


def _row(what: str, planted: int, mine: int, right: int) -> tuple[str, ...]:
    return (
        what,
        f"{planted:,}",
        f"{mine:,}",
        percent(right / mine) if mine else DASH,
        percent(right / planted) if planted else DASH,
    )


def _owner(groups: list[list[int]]) -> dict[int, int]:
    return {member: number for number, group in enumerate(groups) for member in group}


def _pairs(owners: Any) -> int:
    return sum(n * (n - 1) // 2 for n in Counter(owners).values())


def _kind(place: int, names: list[str]) -> str:
    if place == LEFT:
        return "left out"
    name = names[place] if 0 <= place < len(names) else ""
    if name == KEPT:
        return "trained on"
    return "copies" if name in COPIES else name if name == DOUBTED else "other reasons"


def _map(points: list[list[float]], names: list[str]) -> Chart | None:
    parts: dict[str, Points] = {name: [] for name in ("left out", *STYLES)}
    for x, y, place in points:
        parts[_kind(int(place), names)].append((float(x), float(y)))
    told = ", ".join(f"{len(part)} {name}" for name, part in parts.items() if part)
    return chart(
        "growth-map",
        [Line(points=part, style=STYLES[name], dots=True) for name, part in parts.items()],
        title=f"a map of {len(points):,} samples: the two directions in which vectors differ most",
        description=told,
    )


def _tenths(rows: list[dict[str, Any]]) -> list[Chart]:
    drawn = []
    for key, title, style, factor in (
        ("gain", "mean gain of clean samples, by tenth of arrival", "c3", 1.0),
        ("trained", "percentage trained on, by tenth of arrival", "c1", 100.0),
        ("dropped", "percentage dropped, by tenth of arrival", "c2", 100.0),
    ):
        series = [
            (float(i + 1), factor * value)
            for i, row in enumerate(rows)
            if (value := number(row.get(key))) is not None
        ]
        if not series or not any(y for _, y in series):
            continue
        made = chart(
            f"growth-{key}",
            [Line(points=series, style=style), Line(points=series, style=style, dots=True)],
            title=title,
            description=f"{series[0][1]:.3g} in the first tenth, {series[-1][1]:.3g} in the last",
            x_range=(1.0, float(len(rows))),
            y_range=(0.0, 1.15 * max(y for _, y in series)),
            x_name="tenth of the samples, in the order in which they arrived",
            x_about=10,
        )
        drawn += [made] if made else []
    return drawn
