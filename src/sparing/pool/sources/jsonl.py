"""Lines of JSON, plain or compressed, each an object with a text, an image, or both."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Final, final

from sparing.core.errors import RequestError
from sparing.pool.items import Drop, Item
from sparing.pool.sources.reading import Reading, Unreadable
from sparing.pool.sources.rows import Columns, columns, outcome
from sparing.pool.sources.source import DONE, Read, Source
from sparing.pool.sources.stamp import Listed

_LOOKED_AT: Final = 32  # first lines by which columns are found
_DAMAGED: Final = (OSError, EOFError, zlib.error, lzma.LZMAError)


@final
class Lines(Source):
    """Each line is an item; its key is a column's or "file:line"."""

    kind: ClassVar[str] = "jsonl"
    growing: ClassVar[bool] = True

    def __init__(
        self, path: Path, files: Sequence[Listed], *, name: str | None, reading: Reading
    ) -> None:
        """Raises RequestError if the first lines have none of the columns."""
        super().__init__(path, files, name=name, reading=reading)
        self._columns: dict[str, Columns | None] = {}
        for file in files:
            self._named(file)

    def _read(self, file: Listed, at: Any) -> Iterator[Read]:
        if at == DONE:
            return
        named = self._named(file)
        offset, number = at or (0, 0)
        path = self.root / file.name
        most = self.reading.bytes
        with open(path, "rb") as raw, _opened(raw, file.name) as lines:
            try:
                if offset:
                    lines.seek(offset)
                while line := lines.readline(most + 1):
                    number += 1
                    place = f"{file.name}:{number}"
                    if len(line) > most:
                        while line and not line.endswith(b"\n"):
                            line = lines.readline(2**20)
                        told: Item | Drop | None = _drop(
                            place, f"the line has more than {most:,} bytes"
                        )
                    else:
                        told = self._outcome(line, number, named, place)
                    where = [lines.tell(), number]
                    yield Read((told,) if told else (), where, min(raw.tell(), file.size))
            except _DAMAGED as error:
                detail = (
                    f"{file.name} is cut short or damaged after line {number} ({error}); what "
                    "stands before is taken"
                )
                drop = Drop(key=file.name, reason="unreadable", detail=detail)
                yield Read((drop,), DONE, file.size)

    def _outcome(
        self, line: bytes, number: int, named: Columns | None, place: str
    ) -> Item | Drop | None:
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            return None
        try:
            row = _object(line)
        except Unreadable as error:
            return _drop(place, str(error))
        if named is None:
            return _drop(place, f"it has no column of images or texts: {', '.join(sorted(row))}")
        return outcome(row, named, self.root, self.reading, place)

    def _named(self, file: Listed) -> Columns | None:
        """The columns by the first lines that are objects; None where there are none."""
        if file.name in self._columns:
            return self._columns[file.name]
        found: set[str] = set()
        with open(self.root / file.name, "rb") as raw, _opened(raw, file.name) as lines:
            try:
                for number in range(_LOOKED_AT):
                    line = lines.readline(self.reading.bytes + 1)
                    if number == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise RequestError(
                            f"{file.name} is UTF-16; write it in UTF-8 (iconv -f utf-16 -t utf-8)"
                        )
                    try:
                        found.update(_object(line.removeprefix(b"\xef\xbb\xbf")))
                    except Unreadable:
                        continue  # told of when it is read
            except _DAMAGED:
                pass  # told of when it is read
        where = f"{file.name} in its first {_LOOKED_AT} lines"
        self._columns[file.name] = columns(found, self.reading, where) if found else None
        return self._columns[file.name]


def _object(line: bytes) -> dict[str, Any]:
    try:
        held = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"the line is not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}"
        ) from None
    except json.JSONDecodeError as error:
        raise Unreadable(
            f"the line is not JSON ({error.msg.removesuffix(' at')} at character {error.pos + 1})"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
        raise Unreadable(f"the line is not JSON that can be read ({error})") from None
    if not isinstance(held, dict):
        raise Unreadable(f"the line is a JSON {type(held).__name__}, no object")
    return held


def _drop(place: str, detail: str) -> Drop:
    return Drop(key=place, reason="unreadable", detail=f"{place}: {detail}")


def _opened(raw: IO[bytes], name: str) -> Any:
    if name.endswith(".gz"):
        return gzip.open(raw, "rb")
    if name.endswith(".xz"):
        return lzma.open(raw, "rb")
    return raw
