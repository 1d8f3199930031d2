"""The store: append only, safe against crashes, with versions; one writer and many readers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown
from sparing.core.state import replacing
from sparing.pool.items import REASONS, Added, Drop, Item, Vectors
from sparing.pool.store import forgetting, records, segments
from sparing.pool.store.catalogue import FORMAT, Catalogue
from sparing.pool.store.change import FOLDERS
from sparing.pool.store.known import firsts
from sparing.pool.store.view import Moment, View
from sparing.pool.store.writing import Writing, as_json

SHARD: Final = 1 << 28


@final
class Store(Writing):
    """A data set on disk that only grows. What a call has returned from survives a kill.

    Use as a context manager. Readers may be opened meanwhile, in any process; they see the state
    that was committed when they were opened or last ``refresh``-ed. Pickled, it becomes a reader.
    """

    def __init__(self, path: str | Path, *, write: bool = False) -> None:
        """Use ``Store.open`` or ``Store.create``."""
        super().__init__(path, write=write)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        dim: int,
        encoder: str = "",
        dtype: str = "float32",
        second: bool = False,
        shard: int = SHARD,
    ) -> Store:
        """A new store in a folder that is not there or empty, opened for writing.

        dim: length of the vectors; encoder: name and version of what makes them, kept for the
        record; dtype: "float32" or "float16" on the disk; second: keep ``Vectors.second`` too;
        shard: bytes after which a new file is begun. Raises RequestError for a folder that holds
        something, RunError if it cannot be written.
        """
        require_whole("dim", dim, 1)
        require_whole("shard", shard, 1)
        if dtype not in ("float32", "float16"):
            raise unknown("dtype of vectors", dtype, ("float32", "float16"))
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RequestError(
                f"{path} is there already and not empty; open it, or give another place"
            )
        settings = {"format": FORMAT, "dim": dim, "encoder": encoder, "dtype": dtype,
                    "second": bool(second), "shard": min(shard, SHARD)}  # fmt: skip
        with replacing(path) as aside:
            catalogue = Catalogue(aside, write=True)
            catalogue.create(settings)
            catalogue.close()
            for folder in sorted(set(FOLDERS.values())):
                (aside / folder).mkdir()
        return cls(path, write=True)

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> Store:
        """The store at ``path``. Raises RunError if there is none, if it is damaged or of a newer
        version, and for ``write`` if another process writes.
        """
        return cls(path, write=write)

    # reading

    def refresh(self) -> None:
        """See what was committed meanwhile. A writer sees its own writes at once."""
        if self._catalogue is None:
            self._load(None)

    def at(self, snapshot: int) -> View:
        """The store as it was at a snapshot, read only, without what was forgotten since.

        Raises RequestError for an unknown snapshot.
        """
        found = {s.number: s for s in self.snapshots()}
        if snapshot not in found:
            raise unknown("snapshot", str(snapshot), map(str, found))
        return View(self.path, Moment(found[snapshot].change, found[snapshot].next_id))

    # writing

    def append(
        self,
        items: Sequence[Item],
        vectors: Vectors | None,
        *,
        source: str,
        cursor: Any = None,
        columns: Mapping[str, Any] | None = None,
    ) -> Added:
        """Store items with their vectors, durably when this returns.

        cursor: a JSON value, what the source needs to go on behind these items, committed with
        them; columns: values (n,) by name. An item whose content (all but its key) is stored
        already is dropped as "same content", also within the batch. One whose key was used in
        this source for other content is stored, and told of among the drops with reason "kept".
        Raises RequestError for vectors of another size or not finite and for bad columns: then,
        and when it raises RunError for a full disk, nothing of the batch is stored.
        """
        n = len(items)
        blocks = self._blocks(vectors, n)
        given = {}
        for name, values in (columns or {}).items():
            given[name] = self._checked(name, values, n)
        encoded = records.encode(items, source)
        cursor_text = as_json(cursor)
        with self._changing("append") as change:
            hashes, named = self._lookups()
            found = hashes.find(encoded.hashes)
            lead = firsts(encoded.hashes)
            new = np.flatnonzero((found < 0) & (lead == np.arange(n)))
            first = self._state.next_id
            numbers = np.arange(first, first + len(new))
            ids = np.full(n, -1, np.int64)
            ids[new] = numbers
            same = np.where(found >= 0, self._ids[found] if self.size else -1, ids[lead])
            number = self._source(change, source, cursor_text, cursor)
            drops: list[tuple[Drop, int | None]] = [
                (
                    Drop(key=items[i].key, reason="same content", detail=f"item {same[i]}"),
                    int(same[i]),
                )
                for i in np.flatnonzero(ids < 0).tolist()
            ]
            drops += self._twice(items, encoded.named, new, ids, named)
            self._note(change, source, drops)
            if len(new):
                picked = new.tolist()
                keys = [encoded.keys[i] for i in picked]
                contents = [encoded.contents[i] for i in picked]
                sizes = self._payload(change, numbers, keys, contents)
                for which, block in blocks.items():
                    self._rows_of(change, which, block, new, first)
                rows = {
                    "id": numbers,
                    "change": np.full(len(new), change.number),
                    "bytes": sizes,
                    "named": encoded.named[new],
                    "hash": encoded.hashes[new],
                    "source": np.full(len(new), number, np.int32),
                    "kind": encoded.kinds[new],
                    "key": [items[i].key for i in picked],
                    "label": np.array([items[i].label for i in picked], np.int64),
                }
                for name, (values, dtype) in given.items():
                    self._declare(change, name, dtype)
                    rows[name] = values[new]
                change.add(
                    "rows", "", segments.encode(segments.table(rows)), rows=len(new), first=first
                )
                self._state.next_id += len(new)
                hashes.add(encoded.hashes[new], self.size + np.arange(len(new)))
                named.add(encoded.named[new], numbers)
                self._grow(numbers, rows.get("reason"))
        return Added(ids=ids, drops=tuple(drop for drop, _ in drops))

    def flush(self) -> None:
        """Within ``together``: begin to force what was written to the disk, and return at once.

        So it is done beside what else is done in the block; the block's end waits for it.
        """
        if self._change is not None:
            with self._changing("flush") as change:
                change.flush()

    def note_drops(self, source: str, drops: Sequence[Drop], cursor: Any = None) -> None:
        """Keep, durably, why items were never stored, and how far the source was read."""
        for drop in drops:
            if drop.reason not in REASONS:
                raise unknown("reason", drop.reason, REASONS)
        cursor_text = as_json(cursor)
        with self._changing("drops") as change:
            self._source(change, source, cursor_text, cursor)
            self._note(change, source, [(drop, None) for drop in drops])

    def set_column(self, name: str, ids: Any, values: Any, *, note: str = "") -> None:
        """Give items another value; the one before stays in their lineage, with ``note``.

        The first values of a column decide on its type. Raises RequestError for unknown ids.
        """
        ids = np.asarray(ids)
        places = self.positions(ids)
        array, dtype = self._checked(name, values, len(places))
        if not len(places):
            return
        with self._changing(f"set {name}", note) as change:
            self._declare(change, name, dtype)
            self._patch(change, "column", name, "", ids, array)
            if name == "reason":
                self._reasons[places] = array

    def set_scores(self, name: str, ids: Any, values: Any, *, version: str, note: str = "") -> None:
        """Keep what a version of a model says of items; other versions stay beside it.

        values: (n,), NaN for unknown. Raises RequestError for unknown ids.
        """
        if not name or not version or len(name) > 200 or len(version) > 200:
            raise RequestError(
                "a score needs a name and the version of its model, 200 letters at most"
            )
        ids = np.asarray(ids)
        places = self.positions(ids)
        array = np.asarray(values, np.float32)
        if array.shape != places.shape:
            raise RequestError(f"{len(places)} ids need as many scores, got shape {array.shape}")
        if not len(places):
            return
        with self._changing(f"score {name}", note) as change:
            self._patch(change, "score", name, version, ids, array)

    def snapshot(self, label: str = "") -> int:
        """Keep this moment readable through ``at``, and give its number."""
        number = max((s.number for s in self.snapshots()), default=0) + 1
        with self._changing("snapshot") as change:
            row = {"number": number, "label": label, "change": change.number, "size": self.size,
                   "next_id": self._state.next_id, "at": time.time()}  # fmt: skip
            change.execute(self._tables["snapshot"].insert(), [row])
        return number

    def forget(self, ids: Any) -> None:
        """Take items away from everywhere on this disk: their bytes, vectors, columns, scores and
        keys, also from snapshots. Copies made by ``backup`` keep them.

        The files that hold them are written anew without them. Once begun it is finished even
        after a kill, when the store is next opened for writing. The place of a source stays, and
        may name the file that it stopped in. Raises RequestError for unknown ids, RunError on a
        full disk: then they are still there, and where the disk is so full that the request cannot
        be taken back either, it says so.
        """
        self.positions(ids)
        forgetting.forget(self, np.unique(np.asarray(ids, np.int64)))

    @contextmanager
    def together(self, note: str = "") -> Iterator[None]:
        """Make all that is written within this block one change: durable at its end, or nothing
        of it. Ids that ``append`` gives within are not acknowledged before.
        """
        try:
            with self._changing("together", note):
                try:
                    yield
                except OSError as error:
                    raise _OfTheCaller(error) from error  # no failure of the store's disk
        except _OfTheCaller as error:
            raise error.args[0] from None

    def __enter__(self) -> Store:
        return self


class _OfTheCaller(Exception):
    """Carries a caller's own error past those of the store."""
