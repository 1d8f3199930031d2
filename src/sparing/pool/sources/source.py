"""A source of items: read in chunks, each with a cursor from which reading goes on."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, final

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.pool.items import Drop, Item
from sparing.pool.sources.reading import Reading
from sparing.pool.sources.stamp import Listed, difference, stamp

FORMAT: Final = 1
DONE: Final = -1
"""A place in a file from which nothing more is read, whatever it holds."""


class Read(NamedTuple):
    """What stood at one place: its outcomes, where reading goes on, and the bytes behind it."""

    outcomes: Sequence[Item | Drop]
    at: Any
    done: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some items and drops in the order of the source.

    cursor: plain JSON; ``chunks(cursor)`` goes on behind this chunk. done: how much of the
    source's ``total`` has been read.
    """

    items: list[Item]
    drops: list[Drop]
    cursor: dict[str, Any]
    done: int


class Source(ABC):
    """Files read one after the other, in the order of their names.

    What was read is never read again: a cursor holds how many files are done, a hash of their
    names, sizes and times, a stamp of the file in reading and the place in it.
    """

    kind: ClassVar[str]
    growing: ClassVar[bool] = False  # whether a file may go on behind what was read of it

    def __init__(
        self, path: Path, files: Sequence[Listed], *, name: str | None, reading: Reading
    ) -> None:
        """``files`` lie in or at ``path``; ``name`` is by default the whole path."""
        self.path = path
        self.root = path if path.is_dir() else path.parent
        self.name = name if name is not None else str(path.resolve())
        self.files = files
        self.reading = reading
        self.total = sum(file.size for file in files)

    def fingerprint(self) -> dict[str, Any]:
        """What the source is now: kind, files, bytes, and a hash of names, sizes and times."""
        return {"kind": self.kind, **self._done(self.files)[0]}

    def chunks(self, cursor: Mapping[str, Any] | None = None, size: int = 256) -> Iterator[Chunk]:
        """Chunks of at least ``size`` items and drops together, the last one of fewer.

        Where one place of the source gave several drops, a chunk has some more than ``size``.
        Raises RequestError for a cursor of another source or way of reading, or where what was
        read has changed since.
        """
        require_whole("size", size, 1)
        first, at = (0, None) if cursor is None else self._resume(cursor)
        before, hashed = self._done(self.files[:first])
        items: list[Item] = []
        drops: list[Drop] = []
        behind, where, passed = sum(file.size for file in self.files[:first]), at, 0
        number = first
        for number in range(first, len(self.files)):
            file = self.files[number]
            if number > first:
                last = self.files[number - 1]
                behind += last.size
                hashed.update(last.line())
                before = _before(number, behind, hashed)
            where, at = at, None
            for read in self._read(file, where):
                where, passed = read.at, read.done
                for outcome in read.outcomes:
                    if isinstance(outcome, Item):
                        items.append(outcome)
                    else:
                        drops.append(outcome)
                if len(items) + len(drops) >= size:
                    yield self._chunk(items, drops, before, file, where, behind + passed)
                    items, drops = [], []
        if items or drops:
            file = self.files[number]
            yield self._chunk(items, drops, before, file, where, self.total)

    def check(self, cursor: Mapping[str, Any] | None) -> None:
        """Raise RequestError where ``chunks(cursor)`` would, before anything is read."""
        if cursor is not None:
            self._resume(cursor)

    @abstractmethod
    def _read(self, file: Listed, at: Any) -> Iterator[Read]:
        """What the file holds from the place ``at`` on; None is its start."""

    def _state(self) -> dict[str, Any]:
        """What else must not change between restarts, as plain JSON."""
        return {}

    def _chunk(
        self,
        items: list[Item],
        drops: list[Drop],
        before: dict[str, Any],
        file: Listed,
        at: Any,
        done: int,
    ) -> Chunk:
        cursor = {
            "format": FORMAT,
            "kind": self.kind,
            "reading": self.reading.changed(),
            **self._state(),
            "before": before,
            "file": file.name,
            "stamp": stamp(self.root / file.name),
            "at": at,
        }
        return Chunk(items=items, drops=drops, cursor=cursor, done=done)

    def _done(self, files: Sequence[Listed]) -> tuple[dict[str, Any], Any]:
        hashed = hashlib.blake2b(digest_size=16)
        for file in files:
            hashed.update(file.line())
        return _before(len(files), sum(file.size for file in files), hashed), hashed

    def _resume(self, cursor: Mapping[str, Any]) -> tuple[int, Any]:
        """The number of the file and the place in it where reading goes on."""
        if "format" not in cursor:
            raise RequestError(
                f"{self.name} was not read as a source before: something else in the store has its "
                "name; give it another (name=...), or read it anew from its start (--reread)"
            )
        if cursor["format"] > FORMAT:
            raise RequestError(
                f"{self.name}: its cursor was written by a newer version of sparing; upgrade with "
                f'"pip install --upgrade sparing", or read the source anew'
            )
        for what, was, now in (
            ("kind of source", cursor["kind"], self.kind),
            ("options", cursor["reading"], self.reading.changed()),
            *((key, cursor.get(key), value) for key, value in self._state().items()),
        ):
            if was != now:
                raise self._changed(f"its {what} was {was} and is now {now}")
        before = cursor["before"]
        found, _ = self._done(self.files[: before["files"]])
        if found != before:
            raise self._changed(_differs(before, found))
        name = cursor["file"]
        if before["files"] >= len(self.files):
            raise self._changed(f"{name} is gone")
        if self.files[before["files"]].name != name:
            raise self._changed(
                f"{self.files[before['files']].name} stands where {name} stood: files were added, "
                "renamed or removed"
            )
        how = difference(self.root / name, cursor["stamp"], growing=self.growing)
        if how:
            raise self._changed(f"{name} {how}")
        return before["files"], cursor["at"]

    def _changed(self, how: str) -> RequestError:
        return RequestError(
            f"the source {self.name} changed since it was last read: {how}. Put it back as it was, "
            "or read it anew from its start (--reread, or cursor=None): what the store has already "
            "is not stored twice"
        )


def _before(files: int, total: int, hashed: Any) -> dict[str, Any]:
    return {"files": files, "bytes": total, "hash": hashed.hexdigest()}


def _differs(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if was["files"] != now["files"]:
        return f"{was['files']} of its files were read, and only {now['files']} are there"
    if was["bytes"] != now["bytes"]:
        return (
            f"its first {was['files']} files had {was['bytes']:,} bytes and have now "
            f"{now['bytes']:,}: some were added, changed or removed"
        )
    return (
        f"its first {was['files']} files are not the same: some were added, written anew, renamed "
        "or removed"
    )
