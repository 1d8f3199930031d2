"""One change of a store: files first, forced to the disk, then one transaction that tells of them.

Until the transaction has committed nothing refers to what was written: a writer that dies leaves
bytes behind the committed length, and files that no catalogue lists. The next writer removes both.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

from sparing.pool.store import disk
from sparing.pool.store.catalogue import Catalogue, Part, State, grown

FOLDERS: Final = {
    "payload": "payload",
    "vectors": "vectors",
    "rows": "columns",
    "column": "columns",
    "score": "scores",
}


@final
class Change:
    """Files that are written, taken away, and the statements of their transaction."""

    def __init__(self, folder: Path, state: State, handles: dict[int, int], what: str) -> None:
        """``state`` is brought up to date as the change goes on; after ``drop`` throw it away."""
        self.folder, self.state, self.what = folder, state, what
        self.note = ""
        self.empty = True
        self.failed = False
        state.change += 1
        self.number = state.change
        self._handles = handles
        self._dirty: dict[Path, int] = {}
        self._folders: set[Path] = set()
        self._before: dict[int, Part] = {}
        self._new: dict[int, Path] = {}
        self._retired: list[Part] = []
        self._statements: list[tuple[Any, Any]] = []
        self._syncing: list[disk.Syncing] = []
        self.left: list[Path] = []
        """Files that could not be deleted after the commit; the next writer does."""

    def execute(self, statement: Any, rows: Any = None) -> None:
        """Have a statement done in the transaction."""
        self.empty = False
        self._statements.append((statement, rows))

    def extend(self, kind: str, name: str, data: Any, rows: int, first: int) -> None:
        """Append bytes to the last part of a kind, or begin one."""
        self.empty = False
        part = self.last(kind, name)
        if part is None:
            part = self._begin(kind, name, first)
        path = self.folder / part.file
        disk.write(self._handle(part), path, data, part.bytes)
        self._dirty[path] = self._handle(part)
        crc = zlib.crc32(data, part.crc)
        self._put(grown(part, rows=rows, size=memoryview(data).nbytes, crc=crc))

    def flush(self) -> None:
        """Begin to force what was written so far to the disk, beside what the caller does next.

        What fails is raised by the commit.
        """
        if self._dirty or self._folders:
            self._syncing.append(disk.Syncing(self._dirty, self._folders))
            self._dirty, self._folders = {}, set()

    def _wait(self) -> None:
        """Return when nothing is under way any more, and raise what failed."""
        errors = []
        while self._syncing:
            try:
                self._syncing[-1].wait()
            except OSError as error:
                errors.append(error)
            self._syncing.pop()
        if errors:
            raise errors[0]

    def last(self, kind: str, name: str) -> Part | None:
        """The part that may still grow."""
        parts = self.state.of(kind, name)
        return parts[-1] if parts and not parts[-1].sealed else None

    def seal(self, part: Part) -> None:
        """Let nothing be appended to a part any more."""
        self._put(replace(part, sealed=True))
        handle = self._handles.pop(part.number, None)
        path = self.folder / part.file
        if handle is not None:
            self._wait()
            if path in self._dirty:
                disk.sync(self._dirty.pop(path), path)
            os.close(handle)

    def add(
        self,
        kind: str,
        name: str,
        data: Any,
        *,
        rows: int,
        first: int,
        version: str = "",
        level: int = 0,
        sealed: bool = True,
    ) -> Part:
        """Write a part as a whole."""
        self.empty = False
        part = self._named(
            kind, name, first, ".parquet" if kind in ("rows", "column", "score") else ".bin"
        )
        part = replace(part, version=version, level=level, rows=rows, bytes=memoryview(data).nbytes,
                       crc=zlib.crc32(data), sealed=sealed)  # fmt: skip
        path = self.folder / part.file
        self._new[part.number] = path
        handle = disk.create(path)
        self._handles[part.number] = handle
        disk.write(handle, path, data, 0)
        self._dirty[path] = handle
        self._folders.add(path.parent)
        self._put(part)
        return part

    def rewritten(self, part: Part, data: Any, rows: int) -> None:
        """Put a new file with other content in the place of a part."""
        self.retire(part)
        if rows:
            self.add(part.kind, part.name, data, rows=rows, first=part.first,
                     version=part.version, level=part.level, sealed=part.sealed)  # fmt: skip

    def retire(self, part: Part) -> None:
        """Take a part away; its file goes once that is committed."""
        self.empty = False
        self._retired.append(part)
        del self.state.parts[part.number]

    def _named(self, kind: str, name: str, first: int, suffix: str) -> Part:
        number = self.state.next_part
        self.state.next_part += 1
        stem = "".join(c if c.isascii() and (c.isalnum() or c in "_") else "_" for c in name)[:40]
        folder = FOLDERS[kind]
        stem = {"payload": "", "rows": "rows-"}.get(kind, f"{stem}-")
        file = f"{folder}/{stem}{number:05d}{suffix}"
        return Part(number=number, kind=kind, name=name, file=file, first=first,
                    rows=0, bytes=0, crc=0, sealed=False)  # fmt: skip

    def _begin(self, kind: str, name: str, first: int) -> Part:
        part = self._named(kind, name, first, ".bin")
        path = self.folder / part.file
        self._new[part.number] = path
        self._handles[part.number] = disk.create(path)
        self._folders.add(path.parent)
        return part

    def _handle(self, part: Part) -> int:
        if part.number not in self._handles:
            self._handles[part.number] = disk.open_(self.folder / part.file)
        return self._handles[part.number]

    def _put(self, part: Part) -> None:
        before = self.state.parts.get(part.number)
        if before is not None and part.number not in self._new:
            self._before.setdefault(part.number, before)
        self.state.parts[part.number] = part

    def commit(self, catalogue: Catalogue) -> None:
        """Make all of it true, or raise OSError or RunError: then look what was committed."""
        disk.sync_all(self._dirty, self._folders)
        self._wait()
        table = catalogue.tables["part"]
        parts, counter = self.state.parts, catalogue.tables["counter"]
        with catalogue.transaction("write") as connection:
            for part in self._retired:
                if part.number not in self._new:
                    connection.execute(table.delete().where(table.c.number == part.number))
            new = [_row(parts[number]) for number in self._new if number in parts]
            if new:
                connection.execute(table.insert(), new)
            for number in self._before:
                if number in parts:
                    row = _row(parts[number])
                    connection.execute(table.update().where(table.c.number == number).values(row))
            names = ("change", "next_id", "next_part", "forgets", "compacted")
            connection.execute(counter.update().values({n: getattr(self.state, n) for n in names}))
            told = {"number": self.number, "at": time.time(), "what": self.what, "note": self.note}
            connection.execute(catalogue.tables["change"].insert().values(told))
            for statement, rows in self._statements:
                connection.execute(statement, rows) if rows else connection.execute(statement)
        self._end()

    def _end(self) -> None:
        """Close what does not grow, delete what is not referred to; what fails is an orphan."""
        for number in list(self._handles):
            part = self.state.parts.get(number)
            if part is None or part.sealed:
                os.close(self._handles.pop(number))
        for part in self._retired:
            path = self.folder / part.file
            try:
                disk.remove(path)
            except OSError:
                self.left.append(path)

    def drop(self) -> None:
        """Close what was written to. What is on the disk is put right by what is committed."""
        with contextlib.suppress(OSError):
            self._wait()
        for number in [*self._new, *self._before]:
            handle = self._handles.pop(number, None)
            if handle is not None:
                os.close(handle)


def _row(part: Part) -> dict[str, Any]:
    return {name: getattr(part, name) for name in Part.__slots__}
