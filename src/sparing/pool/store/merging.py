"""Few files instead of many: small ones side by side become one, in one change."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sparing.core.errors import RunError
from sparing.pool.store import segments
from sparing.pool.store.catalogue import Part

if TYPE_CHECKING:
    from sparing.pool.store.writing import Writing

FAN: Final = 16
_LARGE: Final = 1 << 20
_SEGMENTS: Final = ("rows", "column", "score")


def tidy(store: Writing) -> None:
    """Merge where FAN segments of one level lie side by side.

    What was stored before stays so if this fails, as on a full disk; a later one merges then.
    """
    run = _due(store)
    while run:
        try:
            with store._changing("merge") as change:
                merged = segments.concatenate(store._files.table(part) for part in run)
                for part in run:
                    change.retire(part)
                change.add(
                    run[0].kind,
                    run[0].name,
                    segments.encode(merged),
                    rows=merged.num_rows,
                    first=run[0].first,
                    version=run[0].version,
                    level=run[0].level + 1,
                )
        except RunError:
            return
        run = _due(store)


def compact(path: str | Path) -> int:
    """Merge what is small, and give back the disk's space: how many bytes it is less.

    Of scores that one version was given several times between two snapshots the last one stays;
    columns keep their history. Needs to be the only writer. Raises RunError on a full disk, and
    for a writer.
    """
    from sparing.pool.store.store import Store

    before = _used(Path(path))
    with Store.open(path, write=True) as store:
        _segments(store)
        for kind, name in (("payload", ""), *(("vectors", which) for which in store._kinds)):
            _shards(store, kind, name)
        store._writable().vacuum()
        store._writable().checkpoint()
    return before - _used(Path(path))


def _due(store: Writing) -> list[Part]:
    groups: dict[tuple[str, str, str, int], list[Part]] = defaultdict(list)
    for part in store._state.parts.values():
        if part.kind in _SEGMENTS and part.rows < _LARGE:
            run = groups[part.kind, part.name, part.version, part.level]
            run.append(part)
            if len(run) >= FAN:
                return sorted(run, key=lambda part: (part.first, part.number))
    return []


def _segments(store: Writing) -> None:
    groups: dict[tuple[str, str, str], list[Part]] = defaultdict(list)
    for part in store._state.parts.values():
        if part.kind in _SEGMENTS:
            groups[part.kind, part.name, part.version].append(part)
    borders = np.array(sorted(s.change for s in store.snapshots()), np.int64)
    with store._changing("compact") as change:
        for (kind, _, _), parts in groups.items():
            parts.sort(key=lambda part: (part.first, part.number))
            for run in _runs(parts, _LARGE, "rows"):
                merged = segments.concatenate(store._files.table(part) for part in run)
                chosen = _last(merged, borders) if kind == "score" else merged
                if len(run) == 1 and chosen.num_rows == merged.num_rows:
                    continue
                for part in run:
                    change.retire(part)
                change.add(
                    kind,
                    run[0].name,
                    segments.encode(chosen),
                    rows=chosen.num_rows,
                    first=run[0].first,
                    version=run[0].version,
                    level=max(part.level for part in run),
                )
        if not change.empty:
            store._state.compacted = change.number


def _last(table: Any, borders: Any) -> Any:
    """Of several values for one item between two snapshots the last one."""
    ids = segments.values_of(table, "id", "int64")
    between = np.searchsorted(borders, segments.values_of(table, "change", "int64"))
    order = np.lexsort((np.arange(len(ids)), between, ids))
    last = np.ones(len(ids), np.bool_)
    same = (ids[order][1:] == ids[order][:-1]) & (between[order][1:] == between[order][:-1])
    last[order[:-1][same]] = False
    return table.filter(segments.arrow().array(last))


def _shards(store: Writing, kind: str, name: str) -> None:
    """Join neighbouring shards that forgetting has left small."""
    limit = store._state.settings["shard"]
    for run in _runs(store._state.of(kind, name), limit, "bytes"):
        if len(run) < 2:
            continue
        with store._changing("compact") as change:
            data = b"".join(store._files.bytes_of(part) for part in run)
            for part in run:
                change.retire(part)
            rows = sum(part.rows for part in run)
            change.add(kind, name, data, rows=rows, first=run[0].first, sealed=run[-1].sealed)
    store._files.forget()
    store._load(None)


def _runs(parts: list[Part], limit: int, measure: str) -> list[list[Part]]:
    """Neighbours that together measure at most ``limit``; one alone may measure more."""
    runs: list[list[Part]] = []
    total = 0
    for part in parts:
        total += getattr(part, measure)
        if not runs or total > limit:
            runs.append([])
            total = getattr(part, measure)
        runs[-1].append(part)
    return runs


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
