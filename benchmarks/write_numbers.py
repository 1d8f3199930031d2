"""Writes docs/numbers.md: every figure of benchmarks/records, and the command that gives it.

    python benchmarks/write_numbers.py

A test checks that the committed page is what the committed records give.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS = HERE / "records"
PAGE = HERE.parent / "docs" / "numbers.md"
HEAD = """# Numbers

Every figure here is read from a record in `benchmarks/records/`, by `make numbers`; do not edit
this page. `make bench-NAME` runs the script of that name again and writes its record anew. Times
hold for the machine that is named with them.
"""
WIDE = 14
"""A table with more columns than this is split up instead."""
Rows = list[list[str]]


def page(records: Path = RECORDS) -> str:
    """The page as text; the same records give the same page."""
    parts = [HEAD]
    for file in sorted(records.glob("*.json")):
        parts.append(section(json.loads(file.read_text(encoding="utf-8")), file.name))
    return "\n".join(parts)


def section(record: Mapping[str, Any], file: str) -> str:
    """One record: how it was made, then its figures."""
    machine = record.get("machine", {})
    versions = machine.get("versions") or machine.get("packages") or {}
    told = [machine.get("cpu") or machine.get("device"), f"{machine.get('cores')} cores"]
    told += [f"python {machine.get('python')}"]
    told += [f"torch {machine['torch']}"] if "torch" in machine else []
    told += [f"{name} {version}" for name, version in versions.items()]
    lines = [
        f"## {record['name']}",
        "",
        f"`{record['command']}`, {record['when'][:10]}, [record](../benchmarks/records/{file}).",
        f"{', '.join(str(part) for part in told if part)}.",
    ]
    lines += ["", str(record["note"])] if record.get("note") else []
    results = record["results"]
    arms = results.get("arms", {})
    if record.get("kind") == "comparison":
        lines += ["", *comparison(results)]
    elif arms and all("overrides" in arm for arm in arms.values()):
        lines += ["", *first_comparisons(results)]
    else:
        lines += [line for block in figures(results) for line in ("", *block)]
    return "\n".join(lines) + "\n"


def comparison(results: Mapping[str, Any]) -> Iterator[str]:
    """A record of ``sparing compare``."""
    metric = results["metric"]["name"].replace("_", " ")
    yield (
        f"Recipe {results.get('recipe')}, {metric}, against **{results['baseline']}**, margin "
        f"{results['margin'].replace('_', ' ')}."
    )
    yield ""
    rows = [["arm", metric, "each seed", "TFLOP", "difference, paired", "verdict"]]
    for name, arm in results["arms"].items():
        judged = arm["judgement"] or {}
        paired = judged.get("paired")
        runs = [
            f"{run['value']:.3f}" if "value" in run else f"{run['seed']}: {run['state']}"
            for run in arm["runs"]
        ]
        flops = arm["costs"].get("flops")
        rows.append(
            [
                name,
                "-" if arm["mean"] is None else f"{arm['mean']:.4f}",
                ", ".join(runs),
                "-" if flops is None else f"{flops / 1e12:.2f}",
                f"{paired['estimate']:+.4f} [{paired['low']:+.4f}, {paired['high']:+.4f}]"
                if paired
                else "-",
                "baseline" if name == results["baseline"] else judged.get("verdict") or "none",
            ]
        )
    yield from table(rows)
    yield ""
    for text in (*results["warnings"], *results["missing"]):
        yield f"- {text}"
    yield from references(results)


def first_comparisons(results: Mapping[str, Any]) -> Iterator[str]:
    """A record from before ``sparing compare``."""
    rows = [["arm", "bits per byte", "each seed", "standard deviation", "TFLOP"]]
    for name, arm in results["arms"].items():
        if "mean" not in arm:
            rows.append([name, "-", "; ".join(arm.get("failed", [])), "-", "-"])
            continue
        spent = statistics.mean(entry["spent"] for entry in arm["flops"])
        sd = arm["standard_deviation"]
        rows.append(
            [
                name,
                f"{arm['mean']:.4f}",
                ", ".join(f"{value:.3f}" for value in arm["bits_per_byte"]),
                "-" if sd is None else f"{sd:.4f}",
                f"{spent / 1e12:.2f}",
            ]
        )
    yield from table(rows)
    yield from references(results)


def references(results: Mapping[str, Any]) -> Iterator[str]:
    """What known methods reach, if the record has it."""
    if results.get("references"):
        yield ""
        yield "References on the same held-out data:"
        yield ""
        yield from table(_as_rows(results["references"]))


def figures(node: Mapping[str, Any], title: str = "") -> Iterator[list[str]]:
    """Any other tree of figures: tables where the branches are alike, else lists."""
    plain = {key: value for key, value in node.items() if _is_figure(value)}
    branches = {key: value for key, value in node.items() if key not in plain}
    block = [f"**{title}**", ""] if title else []
    block += [f"- {key}: {shown(value)}" for key, value in plain.items()]
    flat = {key: _flat(value) for key, value in branches.items()}
    columns = {column for cells in flat.values() for column in cells}
    alike = len(branches) > 1 and set.intersection(*(set(cells) for cells in flat.values()))
    if alike and len(columns) <= WIDE:
        block += ["", *table(_as_rows(flat))] if plain else table(_as_rows(flat))
        yield block
        return
    if plain or (title and not branches):
        yield block
    for key, value in branches.items():
        yield from figures(_mapping(value), f"{title}, {key}" if title else key)


def table(rows: Rows) -> list[str]:
    """Rows of Markdown, the first one as the head."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def shown(value: Any) -> str:
    """A figure as people read it: four digits, a spread as its median and range."""
    if _is_spread(value):
        text = f"{shown(value['median'])} ({shown(value['min'])} to {shown(value['max'])})"
        return text + (f", n = {value['n']}" if "n" in value else "")
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(shown(each) for each in value)
    return str(value)


def _as_rows(cells: Mapping[str, Mapping[str, Any]]) -> Rows:
    columns = list(dict.fromkeys(column for each in cells.values() for column in each))
    rows = [["", *columns]]
    for name, each in cells.items():
        rows.append([str(name), *(shown(each[c]) if c in each else "-" for c in columns)])
    return rows


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """{path in words: figure} of a tree."""
    found = {}
    for key, value in _mapping(node).items():
        name = f"{prefix}, {key}" if prefix else str(key)
        found.update({name: value} if _is_figure(value) else _flat(value, name))
    return found


def _mapping(node: Any) -> Mapping[str, Any]:
    if isinstance(node, Mapping):
        return node
    return {str(i): each for i, each in enumerate(node)}


def _is_spread(value: Any) -> bool:
    return isinstance(value, Mapping) and {"min", "median", "max"} <= set(value) <= {
        "min", "median", "max", "n",
    }  # fmt: skip


def _is_figure(value: Any) -> bool:
    if isinstance(value, list):
        return all(not isinstance(each, Mapping | list) for each in value) and len(value) <= 16
    return _is_spread(value) or not isinstance(value, Mapping | Sequence) or isinstance(value, str)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
