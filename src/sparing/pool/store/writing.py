"""How a store's writer works: the lock, one change at a time, and what to do when it fails."""

from __future__ import annotations

import json
import os
from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError, RunError
from sparing.pool.items import REASONS, Drop, Item, Vectors
from sparing.pool.store import disk, forgetting, merging, records, segments
from sparing.pool.store.catalogue import FILE, Catalogue, State
from sparing.pool.store.change import Change
from sparing.pool.store.known import Growing, Known, firsts
from sparing.pool.store.lock import WriterLock
from sparing.pool.store.recovery import recover
from sparing.pool.store.view import Moment, Reading


class Writing(Reading, ABC):
    """A store that may be open for writing, and what its changes are made of."""

    def __init__(self, path: str | Path, *, write: bool) -> None:
        """Raises RunError if there is no store, or if it is damaged, too new or written."""
        self._lock: WriterLock | None = None
        self._catalogue: Catalogue | None = None
        self._change: Change | None = None
        self._broken: BaseException | None = None
        self._handles: dict[int, int] = {}
        self._hashes: Known | None = None
        self._named: Known | None = None
        if not write:
            super().__init__(path)
            return
        path = Path(path).absolute()
        if not (path / FILE).is_file():
            raise RunError(f"there is no store at {path}; check the path, or create one")
        self._lock = WriterLock(path)
        try:
            self._catalogue = Catalogue(path, write=True)
            with disk.failing(path, "nothing was changed"):
                self._catalogue.migrate()
                recover(path, self._catalogue.read())
            super().__init__(path)
            forgetting.redo(self)
        except BaseException:
            self.close()
            raise

    # how a change is made

    @contextmanager
    def _changing(self, what: str, note: str = "") -> Iterator[Change]:
        catalogue = self._writable()
        if self._change is not None:
            try:
                with disk.failing(self.path, "nothing of this change was stored"):
                    yield self._change
            except BaseException:
                self._change.failed = True
                raise
            return
        change = Change(self.path, self._state, self._handles, what)
        change.note = note
        self._change = change
        try:
            with disk.failing(self.path, "nothing of this change was stored"):
                yield change
                if change.failed:
                    raise RunError("a part of this change failed; nothing of it was stored")
                if change.empty:
                    self._state.change -= 1
                else:
                    change.commit(catalogue)
        except BaseException:
            self._change = None
            change.drop()
            self._reset()
            raise
        self._change = None
        merging.tidy(self)

    def _reset(self) -> None:
        """After a failure only what is committed counts, wherever it happened."""
        assert self._catalogue is not None
        self._hashes = self._named = None
        self._files.forget()
        try:
            recover(self.path, self._catalogue.read())
            self._load(None)
        except BaseException as error:
            self._broken = error

    def _writable(self) -> Catalogue:
        if self._catalogue is None:
            raise RequestError(
                f"the store at {self.path} is open for reading; open it with write=True"
            )
        if self._lock is None or not self._lock.mine:
            raise RequestError(
                f"the store at {self.path} is written by the process that opened it; in a worker "
                f"open it for reading"
            )
        if self._broken is not None:
            raise RunError(
                f"the store at {self.path} failed before and could not look what is committed "
                f"({self._broken}); close it and open it again"
            )
        return self._catalogue

    def _catalogue_to_read(self) -> Catalogue:
        # a forked child must not touch its parent's connection
        mine = self._lock is not None and self._lock.mine
        return self._catalogue if mine and self._catalogue else Catalogue(self.path)

    def _take(self, state: State, moment: Moment) -> None:
        super()._take(state, moment)
        self._grown = (Growing(self._ids), Growing(self._offsets), Growing(self._reasons))
        self._ids, self._offsets, self._reasons = (g.all for g in self._grown)
        self._hashes = self._named = None

    @property
    def _tables(self) -> dict[str, Any]:
        return self._writable().tables

    @property
    def _unsettled(self) -> bool:
        return self._change is not None

    @property
    def _moment(self) -> Moment:
        """A writer sees what it has written; a reader stays where it was."""
        if self._catalogue is None:
            return self._pinned
        return Moment(self._state.change, self._state.next_id)

    @_moment.setter
    def _moment(self, moment: Moment) -> None:
        self._pinned = moment

    def _grow(self, numbers: NDArray[np.int64], reasons: Any) -> None:
        ids, _, old = self._grown
        self._ids = ids.add(numbers)
        self._reasons = old.add(np.zeros(len(numbers), np.int8) if reasons is None else reasons)

    def _lookups(self) -> tuple[Known, Known]:
        """Known content and known keys, read when they are first needed."""
        if self._hashes is None or self._named is None:
            self._hashes, self._named = Known(2), Known(1)
            tables = [self._files.table(p, ["hash", "named"]) for p in self._state.of("rows")]
            hashes = self._joined(tables, "hash", "hash")
            self._hashes.add(hashes, np.arange(len(hashes)))
            self._named.add(self._joined(tables, "named", "uint64"), np.arange(len(hashes)))
        return self._hashes, self._named

    # what a change consists of

    def _payload(
        self, change: Change, numbers: NDArray[np.int64], keys: list[bytes], contents: list[bytes]
    ) -> NDArray[np.int64]:
        made = list(map(records.record, numbers.tolist(), keys, contents))
        sizes = records.sizes(keys, contents)
        ends = np.cumsum(sizes)
        done = 0
        while done < len(made):
            begin = self._room(change, "payload", "")
            base = int(ends[done - 1]) if done else 0
            # as many as begin before the shard is full, one at least
            room = self._state.settings["shard"] - begin
            count = max(1, int(np.searchsorted(ends[done:] - base, room)) + 1)
            chosen = slice(done, done + count)
            data = b"".join(chain.from_iterable(made[chosen]))
            change.extend("payload", "", data, len(made[chosen]), int(numbers[done]))
            places = begin + ends[chosen] - sizes[chosen] - base
            self._offsets = self._grown[1].add(places.astype(np.uint32))
            done += count
        return sizes

    def _rows_of(
        self, change: Change, which: str, block: NDArray[Any], new: NDArray[np.int64], first: int
    ) -> None:
        width = block.shape[1] * block.itemsize
        rows = block if len(new) == len(block) else block[new]
        done = 0
        while done < len(rows):
            begin = self._room(change, "vectors", which)
            count = max(1, (self._state.settings["shard"] - begin) // width)
            chosen = np.ascontiguousarray(rows[done : done + count])
            change.extend("vectors", which, chosen, len(chosen), first + done)
            done += count

    def _room(self, change: Change, kind: str, name: str) -> int:
        """How many bytes the part holds that comes next; a full one is sealed."""
        part = change.last(kind, name)
        if part is not None and part.bytes >= self._state.settings["shard"]:
            change.seal(part)
            part = None
        return 0 if part is None else part.bytes

    def _patch(
        self, change: Change, kind: str, name: str, version: str, ids: Any, values: NDArray[Any]
    ) -> None:
        rows = {
            "change": np.full(len(ids), change.number),
            "id": ids.astype(np.int64),
            "value": values,
        }
        data = segments.encode(segments.table(rows))
        change.add(kind, name, data, rows=len(ids), first=change.number, version=version)

    def _source(self, change: Change, name: str, text: str, cursor: Any) -> int:
        if not name:
            raise RequestError("a source needs a name")
        table = self._tables["source"]
        known = self._state.sources.get(name)
        if known is None:
            number = len(self._state.sources) + 1
            row = {"number": number, "name": clean(name), "cursor": text}
            change.execute(table.insert(), [row])
        else:
            number = known[0]
            if cursor is None:
                return number
            row = {"number": number, "name": clean(name), "cursor": text}
            change.execute(table.update().where(table.c.number == number).values(row))
        self._state.sources[name] = (number, json.loads(text))
        return number

    def _note(self, change: Change, source: str, drops: Sequence[tuple[Drop, int | None]]) -> None:
        if drops:
            rows = [
                {"change": change.number, "source": clean(source), "key": clean(drop.key),
                 "reason": drop.reason, "detail": clean(drop.detail), "same": same}
                for drop, same in drops
            ]  # fmt: skip
            change.execute(self._tables["drop"].insert(), rows)

    def _twice(
        self, items: Sequence[Item], named: NDArray[np.uint64], new: NDArray[np.int64],
        ids: NDArray[np.int64], known: Known,
    ) -> list[tuple[Drop, int | None]]:  # fmt: skip
        """New items whose key this source has used before."""
        if not len(new):
            return []
        lead = new[firsts(named[new].reshape(-1, 1))]
        again = (known.find(named[new]) >= 0) | (lead != new)
        out: list[tuple[Drop, int | None]] = []
        for i in new[again].tolist():
            detail = f"item {ids[i]}: its source has used this key before, for other content"
            out.append((Drop(key=items[i].key, reason="kept", detail=detail), int(ids[i])))
        return out

    def _declare(self, change: Change, name: str, dtype: str) -> None:
        if name not in segments.BUILT_IN and name not in self._state.columns:
            self._state.columns[name] = dtype
            change.execute(self._tables["column"].insert(), [{"name": name, "dtype": dtype}])

    def _checked(self, name: str, values: Any, n: int) -> tuple[NDArray[Any], str]:
        known = {**segments.BUILT_IN, **self._state.columns}.get(name)
        array, dtype = segments.checked(name, values, known, n)
        if name == "reason" and n and not 0 <= array.min() <= array.max() < len(REASONS):
            raise RequestError(f"a reason is a position in REASONS, 0 to {len(REASONS) - 1}")
        return array, dtype

    def _blocks(self, vectors: Vectors | None, n: int) -> dict[str, NDArray[Any]]:
        """Vectors by kind in the type they are stored in, NaN where there are none."""
        dtype, dim = self._state.settings["dtype"], self._state.settings["dim"]
        if vectors is not None and vectors.second is not None and "second" not in self._kinds:
            raise RequestError("this store keeps no second vectors; create it with second=True")
        out = {}
        for which in self._kinds:
            given = None if vectors is None else getattr(vectors, which)
            if given is None:
                out[which] = np.full((n, dim), np.nan, dtype)
                continue
            if given.shape != (n, dim):
                raise RequestError(
                    f"{which} vectors have shape {given.shape}, expected {(n, dim)}: a row an "
                    f"item, as long as the store's; use the encoder it was created with "
                    f'("{self._state.settings["encoder"]}")'
                )
            with np.errstate(over="ignore"):
                block = np.ascontiguousarray(given, dtype)
            bad = ~np.isfinite(block).all(1)
            if bad.any():
                raise RequestError(
                    f"{int(bad.sum())} of {n} {which} vectors are not finite in {dtype}, the first "
                    f"is row {int(bad.argmax())}; look at what the encoder was given"
                )
            out[which] = block
        return out

    def close(self) -> None:
        """Close all files and let others write."""

        mine = self._lock is not None and self._lock.mine
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
        if self._catalogue is not None and mine:
            self._catalogue.close()
        self._catalogue = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if hasattr(self, "_files"):
            super().close()


def clean(text: str) -> str:
    """A text that any database takes: names of files need not be."""
    return segments.clean(text).replace("\0", "\\x00")


def as_json(cursor: Any) -> str:
    """A cursor as text. Raises RequestError for what JSON does not hold."""
    try:
        return json.dumps(cursor, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"a cursor is a value of JSON ({error}), got {cursor!r}") from error
