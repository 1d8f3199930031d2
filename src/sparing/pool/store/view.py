"""Reading a store as of one moment: the newest committed, or a snapshot's."""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeVar, cast, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError, RunError, unknown
from sparing.pool.items import Drop, Item
from sparing.pool.store import records, segments
from sparing.pool.store.catalogue import FILE, Catalogue, Part, Snapshot, State
from sparing.pool.store.files import Files, Gone
from sparing.pool.store.lineage import Event, lineage

_T = TypeVar("_T")
_TRIES: Final = 20


class Moment(NamedTuple):
    """What a view shows: changes up to ``change``, items with ids below ``next_id``."""

    change: int
    next_id: int


class Reading(ABC):
    """A store, as of one moment; what was forgotten since is gone from it too.

    It holds 13 bytes an item in memory, may be used in forked workers and pickled to spawned ones
    (they see the same moment), and stays as it is while a writer goes on.
    """

    def __init__(self, path: str | Path, moment: Moment | None = None) -> None:
        """Raises RunError if there is no store at ``path`` or it is damaged or too new."""
        self.path = Path(path).absolute()  # a program may change its working directory
        if not (self.path / FILE).is_file():
            raise RunError(f"there is no store at {self.path}; check the path, or create one")
        self._files = Files(self.path)
        self._load(moment)

    @abstractmethod
    def _catalogue_to_read(self) -> Catalogue:
        """The catalogue, for one look."""

    def _read(self) -> State:
        return self._catalogue_to_read().read()

    def _load(self, moment: Moment | None) -> None:
        for _ in range(_TRIES):
            state = self._read()
            try:
                self._take(state, moment or Moment(state.change, state.next_id))
            except Gone as error:
                gone = error
                continue
            return
        raise RunError(
            f"{self.path / str(gone)} is missing though the catalogue lists it; put back a copy"
        )

    def _take(self, state: State, moment: Moment) -> None:
        self._state, self._moment = state, moment
        parts = state.of("rows")
        tables = [self._files.table(part, ["id", "bytes", "reason"]) for part in parts]
        ids = self._joined(tables, "id", "int64")
        sizes = self._joined(tables, "bytes", "int64")
        for kind, name in (("payload", ""), *(("vectors", w) for w in self._kinds)):
            if sum(part.rows for part in state.of(kind, name)) != len(ids):
                raise RunError(
                    f"{self.path} is damaged: its {kind} are not as many as its items; "
                    f"put back a copy"
                )
        self._ids = ids[: np.searchsorted(ids, moment.next_id)]
        self._offsets = self._places(sizes, state.of("payload"))
        self._reasons = self._changed("reason", self._joined(tables, "reason", "int8"))

    def _places(self, sizes: NDArray[np.int64], payload: list[Part]) -> NDArray[np.uint32]:
        """Where each record begins in its shard: (N,)."""
        begins = np.cumsum(sizes) - sizes
        start = 0
        for part in payload:
            if part.rows:
                base = int(begins[start])
                end = start + part.rows
                if int(begins[end - 1] + sizes[end - 1]) - base != part.bytes:
                    raise RunError(
                        f"{self.path / part.file} is not as long as its items; put back a copy"
                    )
                begins[start:end] -= base
                start = end
        return begins.astype(np.uint32)

    def _joined(self, tables: Sequence[Any], name: str, dtype: str) -> NDArray[Any]:
        empty = np.zeros(
            (0, 2) if dtype == "hash" else 0,
            np.uint64 if dtype == "hash" else segments.numpy_type(dtype),
        )
        return np.concatenate([empty, *(segments.values_of(t, name, dtype) for t in tables)])

    @property
    def _unsettled(self) -> bool:
        """Whether files may be cut again that are shown: then nobody may keep them mapped."""
        return False

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("main", "second") if self._state.settings["second"] else ("main",)

    def _again(self, read: Callable[[], _T]) -> _T:
        """Read; if a file was taken away meanwhile, look where its content is now, and again."""
        for _ in range(_TRIES):
            try:
                return read()
            except Gone as error:
                gone = error
                self._files.forget()
                self._load(self._moment)
        raise RunError(
            f"{self.path / str(gone)} is missing though the catalogue lists it; put back a copy"
        )

    # what is there

    @property
    def settings(self) -> dict[str, Any]:
        """What the store was created with: dim, dtype, encoder, second and more."""
        return dict(self._state.settings)

    @property
    def size(self) -> int:
        """How many items are stored, whatever their reason."""
        return len(self._ids)

    def __len__(self) -> int:
        return self.size

    def ids(self) -> NDArray[np.int64]:
        """(N,) in order of arrival, which is ascending; not to be written."""
        return _frozen(self._ids)

    @property
    def alive(self) -> NDArray[np.bool_]:
        """(N,) which items' reason is "kept"."""
        return cast(NDArray[np.bool_], self._reasons == 0)

    def positions(self, ids: Any) -> NDArray[np.int64]:
        """Where ids (n,) are in ``ids()``. Raises RequestError for one that is not there."""
        wanted = np.asarray(ids)
        if wanted.size == 0:
            wanted = wanted.astype(np.int64)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise RequestError(
                f"ids are a vector of whole numbers, got {wanted.dtype} of shape {wanted.shape}"
            )
        wanted = wanted.astype(np.int64, copy=False)
        own = self._ids
        places = np.searchsorted(own, wanted)
        lost = places >= len(own)
        lost[~lost] = own[places[~lost]] != wanted[~lost]
        if lost.any():
            first = int(wanted[lost.argmax()])
            raise RequestError(
                f"{int(lost.sum())} of {len(wanted)} ids are not in the store, the first is "
                f"{first}: never stored here, or forgotten"
            )
        return places

    def sources(self) -> dict[str, Any]:
        """The cursor that each source was last stored with."""
        return {name: cursor for name, (_, cursor) in self._state.sources.items()}

    def drops(self, limit: int | None = None) -> builtins.list[Drop]:
        """Items that were never stored, as they came, or the last ``limit`` of them.

        With reason "kept": an item that was stored although its source had used its key before.
        """
        catalogue = self._catalogue_to_read()
        with catalogue.transaction("read") as connection:
            table = catalogue.tables["drop"]
            query = table.select().where(table.c.change <= self._moment.change)
            query = query.order_by(table.c.number.desc())
            if limit is not None:
                query = query.limit(limit)
            rows = connection.execute(query).all()
        return [Drop(key=r.key, reason=r.reason, detail=r.detail) for r in reversed(rows)]

    def snapshots(self) -> builtins.list[Snapshot]:
        """All that were made, the oldest first."""
        return self._catalogue_to_read().snapshots()

    def lineage(self, number: int) -> builtins.list[Event]:
        """Where an item came from, and what was set of it since, in order.

        Raises RequestError for an id that is not there.
        """
        return self._again(lambda: lineage(self, number))

    # columns and scores

    def columns(self) -> list[str]:
        """Names of all columns."""
        return [*segments.FIXED, *segments.BUILT_IN, *self._state.columns]

    def column(self, name: str) -> NDArray[Any]:
        """(N,) aligned with ``ids()``: id, key, source, kind, bytes, label, reason and own ones.

        Where an item was given no value it is NaN, -1, False or "". "hash" is (N, 2) uint64.
        Raises RequestError for a column that there is not.
        """
        if name == "reason":
            return self._reasons.copy()
        return self._again(lambda: self._column(name))

    def _column(self, name: str) -> NDArray[Any]:
        dtype = {**segments.FIXED, **segments.BUILT_IN, **self._state.columns}.get(name)
        if dtype is None:
            raise unknown("column", name, self.columns())
        tables = [self._files.table(part, [name]) for part in self._state.of("rows")]
        base = self._joined(tables, name, dtype)[: self.size]
        if name == "source":
            names = {number: source for source, (number, _) in self._state.sources.items()}
            known = np.full(max(names, default=0) + 1, "", object)
            known[list(names)] = list(names.values())
            return cast(NDArray[Any], known[base])
        if name == "kind":
            return segments.kind_names(base)
        return base if name in segments.FIXED else self._changed(name, base)

    def _changed(self, name: str, base: NDArray[Any]) -> NDArray[Any]:
        """A column's values as items arrived with them, and what was set since."""
        out = base[: self.size].copy()
        for part in self._state.of("column", name):
            self._apply(part, out)
        return out

    def _apply(self, part: Part, out: NDArray[Any]) -> None:
        if part.first > self._moment.change:
            return
        data = self._files.table(part)
        ids, values = segments.values_of(data, "id", "int64"), data.column("value").to_numpy()
        seen = segments.values_of(data, "change", "int64") <= self._moment.change
        places = np.searchsorted(self._ids, ids)
        seen &= places < self.size
        seen[seen] = self._ids[places[seen]] == ids[seen]
        out[places[seen]] = values[seen]  # of several values for one item the last one stays

    def scores(self, name: str, version: str | None = None) -> NDArray[np.float32]:
        """(N,) the scores that one version of a model gave, NaN where it gave none.

        version: the one that was set last where None. Raises RequestError for an unknown name or
        version.
        """
        return self._again(lambda: self._scores(name, version))

    def _scores(self, name: str, version: str | None) -> NDArray[np.float32]:
        versions = self.versions(name)
        if not versions:
            known = {p.name for p in self._state.parts.values() if p.kind == "score"}
            raise unknown("score", name, known)
        if version is not None and version not in versions:
            raise unknown(f'version of the score "{name}"', version, versions)
        if self._state.compacted > self._moment.change and self._moment.change not in {
            snapshot.change for snapshot in self.snapshots()
        }:
            raise RunError(
                f"the store at {self.path} was compacted since this reader was opened, and scores "
                f"of then are gone; refresh it"
            )
        out = np.full(self.size, np.nan, np.float32)
        for part in self._state.of("score", name, versions[-1] if version is None else version):
            self._apply(part, out)
        return out

    def versions(self, name: str) -> list[str]:
        """The versions that a score has, the one that was set last comes last."""
        latest: dict[str, int] = {}
        for part in self._state.of("score", name):
            if part.first <= self._moment.change:
                latest[part.version] = max(part.first, latest.get(part.version, 0))
        return sorted(latest, key=lambda version: latest[version])

    # vectors and items

    def vectors(self, ids: Any = None, which: str = "main") -> NDArray[np.float32]:
        """(n, d) float32 of these ids, or of all in the order of ``ids()``; NaN without vectors.

        All of one file in float32 come mapped from the disk, not to be written; else they are
        copied. Raises RequestError for ids that are not there.
        """
        return self._again(lambda: self._vectors(ids, which))

    def _vectors(self, ids: Any, which: str) -> NDArray[np.float32]:
        if which not in self._kinds:
            raise unknown("kind of vectors", which, self._kinds)
        dtype, dim = self._state.settings["dtype"], self._state.settings["dim"]
        parts = self._state.of("vectors", which)
        blocks = [self._files.matrix(part, dtype, dim) for part in parts]
        if ids is None:
            if len(blocks) == 1 and not self._unsettled:
                return blocks[0][: self.size].astype(np.float32, copy=False)
            every = [np.zeros((0, dim), np.float32), *blocks]
            return np.concatenate(every, dtype=np.float32)[: self.size]
        places = self.positions(ids)
        if len(blocks) == 1:
            return blocks[0][places].astype(np.float32, copy=False)
        out = np.empty((len(places), dim), np.float32)
        for block, begin, inside in self._spread(places, parts):
            out[inside] = blocks[block][places[inside] - begin]
        return out

    def _spread(
        self, places: NDArray[np.int64], parts: Sequence[Part]
    ) -> list[tuple[int, int, NDArray[np.int64]]]:
        """Which of ``places`` lie in which part: (number of the part, its first place, which)."""
        ends = np.cumsum([part.rows for part in parts], dtype=np.int64)
        owner = np.searchsorted(ends, places, side="right")
        return [
            (int(part), int(ends[part]) - parts[part].rows, np.flatnonzero(owner == part))
            for part in np.unique(owner)
        ]

    def items(self, ids: Any) -> builtins.list[Item]:
        """The items of ids (n,), each checked. Raises RequestError for ids that are not there,
        RunError for a damaged item.
        """
        return self._again(lambda: self._items(ids))

    def _items(self, ids: Any) -> builtins.list[Item]:
        places = self.positions(ids)
        out: builtins.list[Item | None] = [None] * len(places)
        parts = self._state.of("payload")
        for block, begin, inside in self._spread(places, parts):
            part = parts[block]
            data = self._files.bytes_of(part)
            for index in inside.tolist():
                place = int(places[index])
                start = int(self._offsets[place])
                last = place - begin + 1 == part.rows
                end = part.bytes if last else int(self._offsets[place + 1])
                try:
                    out[index] = records.decode(bytes(data[start:end]), int(self._ids[place]))
                except RunError as error:
                    raise RunError(
                        f"{self.path / part.file} is damaged at byte {start}: {error}; "
                        f"put back a copy"
                    ) from error
        return cast(builtins.list[Item], out)

    def __reduce__(self) -> tuple[Any, ...]:
        return View, (self.path, self._moment)

    def close(self) -> None:
        """Close the files; what was read stays valid."""
        self._files.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@final
class View(Reading):
    """A store, read only, as it was at a snapshot or is in another process."""

    def _catalogue_to_read(self) -> Catalogue:
        return Catalogue(self.path)


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view
