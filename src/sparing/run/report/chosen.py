"""Which samples were taken: by epoch, by domain, by difficulty, and some of them to look at."""

from __future__ import annotations

from typing import Any, Final

from sparing.run.report.charts import Chart, Line, chart
from sparing.run.report.passages import LEVELS
from sparing.run.report.read import Run, number
from sparing.run.report.words import percent, significant, visible

COLUMNS: Final = 15
"""Epochs that a table shows at most, spread evenly, the first and the last among them."""


def chosen(run: Run) -> dict[str, Any] | None:
    """What the section shows, None where no method chose samples."""
    selection = run.page.get("selection") or {}
    size, lengths = number(selection.get("size")), selection.get("lengths") or []
    if not size or not lengths:
        return None
    shares = [length / size for length in lengths]
    epochs = _spread(len(lengths))
    return {
        "mean": percent(sum(shares) / len(shares)),
        "size": f"{size:,}",
        "epochs": len(lengths),
        "never": _never(selection, size),
        "share": _share_chart(shares),
        "columns": [str(epoch + 1) for epoch in epochs],
        "tables": [table for table in (_by_domain(run, epochs), _by_difficulty(selection, epochs))
                   if table],
        "histogram": _histogram(selection.get("histogram") or {}),
        "groups": _groups(run, selection),
    }  # fmt: skip


def pictures(run: Run) -> list[dict[str, Any]]:
    """Groups of pictures that the task itself shows."""
    return [
        {"title": str(group.get("title") or ""), "items": items}
        for group in run.page.get("pictures") or []
        if (items := _items(group.get("pictures") or []))
    ]


def _spread(count: int) -> list[int]:
    if count <= COLUMNS:
        return list(range(count))
    return [round(i * (count - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]


def _never(selection: dict[str, Any], size: float) -> str:
    count = number(selection.get("never_dropped"))
    return "" if count is None else f"{count:,} ({percent(count / size)})"


def _share_chart(shares: list[float]) -> Chart | None:
    points = [(float(i + 1), 100 * share) for i, share in enumerate(shares)]
    return chart(
        "kept-share",
        [Line(points=points, style="c1"), Line(points=points, style="c1", dots=True,
              label=f"{points[-1][1]:.0f} %")],
        title="share of the samples that each epoch took, in percent",
        description=f"from {shares[0]:.0%} in the first epoch to {shares[-1]:.0%} in the last",
        x_range=(1.0, float(max(2, len(shares)))),
        y_range=(0.0, 105.0),
        x_name="epoch",
    )  # fmt: skip


def _row(name: str, shares: list[float | None]) -> tuple[str, list[tuple[int, str, bool]]]:
    cells = []
    for share in shares:
        if share is None:
            cells.append((0, "", False))
        else:
            level = round((LEVELS - 1) * min(1.0, max(0.0, share)))
            cells.append((level, f"{100 * share:.0f}", True))
    return name, cells


def _by_domain(run: Run, epochs: list[int]) -> dict[str, Any] | None:
    taken = run.page.get("taken") or {}
    sizes, counts = taken.get("sizes") or {}, taken.get("epochs") or {}
    rows = []
    for name, size in sizes.items():
        row = counts.get(name) or []
        shares = [row[e] / size if e < len(row) and size else None for e in epochs]
        rows.append(_row(str(name), shares))
    return {"title": f"by {run.domain_name}", "rows": rows} if len(rows) > 1 else None


def _by_difficulty(selection: dict[str, Any], epochs: list[int]) -> dict[str, Any] | None:
    by_epoch = selection.get("by_difficulty") or []
    tenths = max((len(row) for row in by_epoch), default=0)
    rows = []
    for i in range(tenths):
        shares = [
            by_epoch[e][i] if e < len(by_epoch) and i < len(by_epoch[e]) else None for e in epochs
        ]
        name = {0: "easiest", tenths - 1: "hardest"}.get(i, f"tenth {i + 1}")
        rows.append(_row(name, shares))
    title = "by difficulty: tenths by the score at the epoch's start"
    return {"title": title, "rows": rows} if rows else None


def _histogram(found: dict[str, Any]) -> dict[str, Any] | None:
    counts, edges = found.get("counts") or [], found.get("edges") or []
    if not counts or len(edges) != len(counts) + 1 or not max(counts):
        return None
    low, high, mean = edges[0], edges[-1], number(found.get("mean"))
    most = max(counts)
    inside = mean is not None and low <= mean <= high
    return {
        "bars": [
            {"height": round(count / most, 4), "title": f"{count:,} from {significant(edge)}"}
            for count, edge in zip(counts, edges, strict=False)
        ],
        "low": significant(low),
        "high": significant(high),
        "mean": significant(mean) if mean is not None and inside else "",
        "at": round(100 * (mean - low) / (high - low), 2) if mean is not None and inside else 0,
    }


def _groups(run: Run, selection: dict[str, Any]) -> list[dict[str, Any]]:
    shown = run.page.get("shown") or {}
    return [
        {"title": str(group.get("title") or ""), "items": items}
        for group in selection.get("groups") or []
        if (items := _items([shown.get(str(i)) for i in group.get("index") or []]))
    ]


def _items(given: list[Any]) -> list[dict[str, str]]:
    """Samples with a caption; an image only if it is a picture that the page itself holds."""
    found = []
    for item in given:
        if not isinstance(item, dict):
            continue
        image = str(item.get("image") or "")
        text = visible(str(item.get("text") or ""))
        if not image.startswith("data:image/png;base64,"):
            image = ""
        if image or text:
            found.append(
                {"image": image, "text": text, "caption": visible(str(item.get("caption") or ""))}
            )
    return found
