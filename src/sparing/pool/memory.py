"""A store in memory, with the interface of the one on disk, for a pool without a path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.items import IMAGE_HASH, UNLABELLED, Added, Drop, Item, Vectors
from sparing.pool.store import content_hash, content_hashes

Ids = NDArray[np.int64]

EMPTY: Final[Mapping[str, Any]] = {
    "reason": np.int64(0),
    "label": np.int64(UNLABELLED),
    IMAGE_HASH: np.uint64(0),
}
"""What a column holds where nothing was said; others hold -1, or NaN where they are floating."""
BLOCK: Final = 4096
"""Vectors that lie together."""


@final
class MemoryStore:
    """Items, vectors, columns and scores by id. See ``store.Store`` for what each does."""

    def __init__(self, dim: int, encoder: str = "", second: bool = False) -> None:
        self.dim, self.encoder, self.second = dim, encoder, second
        self._ids: Ids = np.empty(0, np.int64)
        self._next = 0
        self._items: dict[int, Item] = {}
        self._known: dict[bytes, int] = {}
        self._rows: dict[str, Growing] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        self._scores: dict[tuple[str, str], NDArray[np.float32]] = {}
        self._drops: list[tuple[Drop, int]] = []  # with the item of the same content, or -1
        self._sources: dict[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        return {"dim": self.dim, "encoder": self.encoder, "second": self.second}

    @contextmanager
    def together(self, note: str = "") -> Iterator[None]:
        yield

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def snapshot(self, label: str = "") -> int:
        raise RequestError("a pool in memory keeps no snapshots; give it a path")

    @property
    def size(self) -> int:
        return int(self._ids.size)

    def ids(self) -> Ids:
        return self._ids

    @property
    def alive(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.column("reason") == 0
        return found

    def append(
        self,
        items: Sequence[Item],
        vectors: Vectors | None,
        *,
        source: str,
        cursor: Any = None,
        columns: Mapping[str, NDArray[Any]] | None = None,
    ) -> Added:
        marks = content_hashes(items)
        first: dict[bytes, int] = {}
        drops: list[tuple[Drop, int]] = []
        new: list[int] = []
        for at, (item, mark) in enumerate(zip(items, marks, strict=True)):
            twin = self._known.get(mark, first.get(mark))
            if twin is None:
                first[mark] = self._next + len(new)
                new.append(at)
            else:
                again = Drop(key=item.key, reason="same content", detail=f"item {twin}")
                drops.append((again, twin))
        ids = np.full(len(items), -1, np.int64)
        ids[new] = np.arange(self._next, self._next + len(new))
        for at in new:
            self._items[int(ids[at])] = items[at]
        self._known.update(first)
        if vectors is not None:
            self._keep("main", vectors.main[new])
            if self.second and vectors.second is not None:
                self._keep("second", vectors.second[new])
        labels = np.array([items[at].label for at in new], np.int64)
        given = {"label": labels, **{k: np.asarray(v)[new] for k, v in (columns or {}).items()}}
        for name in set(self._columns) | set(given):
            old = self.column(name) if name in self._columns else None
            part = given.get(name)
            if part is None:
                assert old is not None
                part = np.full(len(new), _empty(name, old.dtype))
            if old is None:
                old = np.full(self.size, _empty(name, part.dtype))
            self._columns[name] = np.concatenate([old, part])
        for key, held in self._scores.items():
            unknown = np.full(len(new), np.nan, np.float32)
            self._scores[key] = np.concatenate([held, unknown])
        self._ids = np.concatenate([self._ids, ids[new]])
        self._next += len(new)
        self.note_drops(source, (), cursor)
        self._drops.extend(drops)
        return Added(ids=ids, drops=[drop for drop, _ in drops])

    def _keep(self, which: str, rows: NDArray[np.float32]) -> None:
        if rows.shape[1:] != (self.dim,) or not np.isfinite(rows).all():
            raise RequestError(
                f"vectors must be finite, of shape (n, {self.dim}), got {tuple(rows.shape)}"
            )
        if which not in self._rows:
            self._rows[which] = Growing(self.dim)
        self._rows[which].add_(rows)

    def note_drops(self, source: str, drops: Sequence[Drop], cursor: Any = None) -> None:
        self._drops.extend((drop, -1) for drop in drops)
        if cursor is not None or source not in self._sources:
            self._sources[source] = cursor

    def column(self, name: str) -> NDArray[Any]:
        if name not in self._columns:
            return np.full(self.size, EMPTY.get(name, np.int64(-1)))
        return self._columns[name]

    def set_column(self, name: str, ids: Ids, values: Any, *, note: str = "") -> None:
        wide = np.asarray(values)
        if name not in self._columns:
            dtype = np.result_type(wide, self.column(name))
            self._columns[name] = np.full(self.size, _empty(name, dtype), dtype)
        self._columns[name][self._at(ids)] = wide

    def scores(self, name: str, version: str | None = None) -> NDArray[np.float32]:
        known = [v for n, v in self._scores if n == name]
        chosen = version if version is not None else (known[-1] if known else "")
        held = self._scores.get((name, chosen))
        return np.full(self.size, np.nan, np.float32) if held is None else held

    def set_scores(self, name: str, ids: Ids, values: Any, *, version: str, note: str = "") -> None:
        held = self._scores.setdefault((name, version), np.full(self.size, np.nan, np.float32))
        held[self._at(ids)] = values

    def vectors(self, ids: Ids | None = None, which: str = "main") -> NDArray[np.float32]:
        if which not in self._rows:
            raise RequestError(f'there are no vectors "{which}"')
        return self._rows[which].at(np.arange(self.size) if ids is None else self._at(ids))

    def items(self, ids: Ids) -> list[Item]:
        self._at(ids)
        return [self._items[i] for i in np.asarray(ids).tolist()]

    def drops(self, limit: int | None = None) -> list[Drop]:
        found = [drop for drop, _ in self._drops]
        return found if limit is None else found[-limit:]

    def sources(self) -> dict[str, Any]:
        return dict(self._sources)

    def forget(self, ids: Ids) -> None:
        at = self._at(ids)
        stays = np.ones(self.size, bool)
        stays[at] = False
        for i in np.asarray(ids).tolist():
            del self._known[content_hash(self._items.pop(i))]
        for held in self._rows.values():
            held.keep_(stays)
        self._columns = {k: v[stays] for k, v in self._columns.items()}
        self._scores = {k: v[stays] for k, v in self._scores.items()}
        self._ids = self._ids[stays]
        gone = set(np.asarray(ids).tolist())
        self._drops = [(drop, twin) for drop, twin in self._drops if twin not in gone]

    def _at(self, ids: Any) -> Ids:
        wanted = np.asarray(ids, np.int64)
        found = np.searchsorted(self._ids, wanted)
        known = found < self.size
        known[known] = self._ids[found[known]] == wanted[known]
        if not known.all():
            raise RequestError(f"there is no item {wanted[~known][0]}")
        return found


@final
class Growing:
    """Rows in blocks of one size, so that what is there is never copied when more come."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._blocks: list[NDArray[np.float32]] = []
        self._size = 0

    def add_(self, rows: NDArray[np.float32]) -> None:
        while len(rows):
            used = self._size % BLOCK
            if not used:
                self._blocks.append(np.empty((BLOCK, self._dim), np.float32))
            part = rows[: BLOCK - used]
            self._blocks[-1][used : used + len(part)] = part
            self._size += len(part)
            rows = rows[len(part) :]

    def at(self, places: Ids) -> NDArray[np.float32]:
        """Of these places, of which each must be there, a copy."""
        out = np.empty((len(places), self._dim), np.float32)
        block = places // BLOCK
        for number in np.unique(block).tolist():
            here = block == number
            out[here] = self._blocks[number][places[here] % BLOCK]
        return out

    def keep_(self, stays: NDArray[np.bool_]) -> None:
        kept = self.at(np.flatnonzero(stays))
        self._blocks, self._size = [], 0
        self.add_(kept)


def _empty(name: str, dtype: Any) -> Any:
    known = EMPTY.get(name)
    if known is not None:
        return known
    return np.nan if np.dtype(dtype).kind == "f" else np.dtype(dtype).type(-1)
