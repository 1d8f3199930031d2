"""Parquet files, a row an item, read by row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, final

from sparing.core.errors import RequestError
from sparing.pool.items import Drop
from sparing.pool.sources.reading import Reading, Unreadable
from sparing.pool.sources.rows import columns, outcome
from sparing.pool.sources.source import DONE, Read, Source
from sparing.pool.sources.stamp import Listed

_MAGIC: Final = b"PAR1"
_ROWS: Final = 256  # so many are in memory at a time


@final
class Rows(Source):
    """Each row is an item; its key is a column's or "file:row", from 0 on."""

    kind: ClassVar[str] = "parquet"

    def __init__(
        self, path: Path, files: Sequence[Listed], *, name: str | None, reading: Reading
    ) -> None:
        """Raises RequestError for a file of another format and for columns that are not there."""
        try:
            import pyarrow.parquet  # noqa: F401
        except ModuleNotFoundError as error:
            raise RequestError(
                f'Parquet needs the package "{error.name}", which is not installed; run: '
                'pip install "sparing[pool]"'
            ) from error
        super().__init__(path, files, name=name, reading=reading)
        for file in files:
            with open(self.root / file.name, "rb") as opened:
                head = opened.read(4)
            if head != _MAGIC:
                raise RequestError(
                    f"{self.root / file.name} is no Parquet: it begins with {head!r}"
                )
            try:
                with _table(self.root / file.name) as table:
                    columns(table.schema_arrow.names, reading, file.name)
            except Unreadable:
                continue  # told of when it is read

    def _read(self, file: Listed, at: Any) -> Iterator[Read]:
        if at == DONE:
            return
        begin, behind = at or 0, 0
        try:
            with _table(self.root / file.name) as table:
                rows = table.metadata.num_rows
                for group in range(table.num_row_groups):
                    first, behind = behind, behind + table.metadata.row_group(group).num_rows
                    if behind > begin:
                        yield from self._group(file, table, group, first, begin, rows)
        except Unreadable as error:
            detail = f"{file.name}: {error}"
            drop = Drop(key=file.name, reason="unreadable", detail=detail)
            yield Read((drop,), DONE, file.size)

    def _group(
        self, file: Listed, table: Any, group: int, first: int, begin: int, rows: int
    ) -> Iterator[Read]:
        """The rows of one group, of which the first has the number ``first``, from ``begin`` on."""
        named = columns(table.schema_arrow.names, self.reading, file.name)
        number = first
        last = first + table.metadata.row_group(group).num_rows
        batches = table.iter_batches(_ROWS, row_groups=[group], columns=named.read)
        while number < last:
            try:
                held = _cells(next(batches), named.text)
            except StopIteration:
                break
            except Exception as error:  # Arrow raises many kinds for damaged pages
                shown = str(error).splitlines()[0] if str(error) else type(error).__name__
                detail = f"{file.name}: rows {number} to {last - 1} are damaged ({shown[:200]})"
                drop = Drop(key=f"{file.name}:{number}", reason="unreadable", detail=detail)
                yield Read((drop,), last, file.size * last // rows)
                return
            for row in held:
                number += 1
                if number > begin:
                    place = f"{file.name}:{number - 1}"
                    told = outcome(row, named, self.root, self.reading, place)
                    yield Read((told,), number, file.size * number // rows)


@contextmanager
def _table(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4))
            cut = file.read() != _MAGIC
        shown = str(error).splitlines()[0][:200]
        raise Unreadable(
            "cut short: its end, which says where the rows are, is missing, so none can be read; "
            "write or copy it again"
            if cut
            else f"its end, which says where the rows are, is damaged ({shown})"
        ) from None
    with table:
        yield table


def _cells(batch: Any, text: str | None) -> list[dict[str, Any]]:
    """The batch's rows as dictionaries; texts as bytes, so that one damaged text drops one row."""
    import pyarrow

    held: dict[str, list[Any]] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        words = True
        if pyarrow.types.is_string(column.type):
            column = column.cast(pyarrow.binary())
        elif pyarrow.types.is_large_string(column.type):
            column = column.cast(pyarrow.large_binary())
        else:
            words = False
        held[name] = column.to_pylist()
        if words and name != text:  # paths, keys, labels
            held[name] = [
                cell if cell is None else cell.decode(errors="surrogateescape")
                for cell in held[name]
            ]
    return [dict(zip(held, row, strict=True)) for row in zip(*held.values(), strict=True)]
