"""Parquet and CSV files of one log, read in batches; what is wrong in them, told by row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from sparing.core.errors import RequestError, nearest
from sparing.tasks.clicks.columns import Kind, Misplaced, kind_of
from sparing.tasks.clicks.schema import Schema

PARQUET: Final = (".parquet", ".pq")
CSV: Final = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
ROWS: Final = 1 << 17
"""Rows of a batch of Parquet."""
_BYTES: Final = 8 << 20
"""Bytes of a batch of CSV."""
_CELL = re.compile(
    r"In CSV column #(\d+): (?:Row #(\d+): )?CSV conversion error to ([^:]+): (.*)", re.DOTALL
)
_LINE = re.compile(r"CSV parse error: (?:Row #(\d+): )?(.*)", re.DOTALL)


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one file: an arrow record batch, whose first row is the file's row ``first``.

    ``number`` is that row's in the whole log.
    """

    file: Path
    first: int
    number: int
    batch: Any


@final
@dataclass(frozen=True, slots=True)
class Block:
    """What can be read by itself: a row group of a Parquet file, or a CSV file as a whole.

    ``first`` is its first row in the file, ``number`` the same row in the whole log; of CSV files,
    whose rows nobody has counted, ``rows`` and ``number`` are 0.
    """

    file: Path
    group: int
    first: int
    number: int
    rows: int


@final
class LogFiles:
    """The files of a log, which all have the schema's columns with types that agree.

    ``paths``: a file, a directory (its Parquet and CSV files by name) or several of them; with one
    kind of files only. Raises RequestError for what is not there, cannot be read, lacks a column
    or has it with another type, and names the column and both files.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], schema: Schema) -> None:
        self.schema = schema
        self.files = _found(paths)
        self.parquet = _is(self.files[0], PARQUET)
        for file in self.files:
            if _is(file, PARQUET) != self.parquet:
                raise RequestError(
                    f"{self.files[0].name} and {file.name} are not of one kind: read Parquet and "
                    "CSV apart"
                )
        self.kinds: dict[str, Kind] = dict.fromkeys(schema.text, "text")
        self.blocks: tuple[Block, ...] = ()
        self._types: dict[str, Any] = {}
        self._abouts: dict[Path, Any] = {}
        self._room = 0
        self._kept: list[tuple[int, Piece]] = []
        self._whole = False
        self._check()

    @property
    def rows(self) -> int | None:
        """How many there are; None for CSV, whose rows nobody has counted."""
        return sum(block.rows for block in self.blocks) if self.parquet else None

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """All rows in the order of the files, with the position of the block that they are of.

        Errors as for ``LogFiles``, by column and row.
        """
        if self._whole:
            yield from self._kept
            return
        self._kept = []
        number = held = 0
        for position, block in enumerate(self.blocks):
            for piece in self.block(block, number):
                held += piece.batch.nbytes if self._room else 0
                if held > self._room:
                    self._kept = []
                elif self._room:
                    self._kept.append((position, piece))
                yield position, piece
                number += len(piece.batch)
        self._whole = bool(self._kept)

    def keep(self, room: int) -> None:
        """Of CSV, whose parsing is dear, hold what a pass has parsed, if it fits ``room`` bytes.

        The next passes then parse nothing. 0 drops what is held.
        """
        self._room, self._kept, self._whole = (0 if self.parquet else room), [], False

    def block(self, block: Block, number: int | None = None) -> Iterator[Piece]:
        """The rows of one block; ``number``, that of its first row, if the block does not know."""
        import pyarrow as pa

        first = 0
        begin = block.number if number is None else number
        try:
            for batch in self._parquet(block) if self.parquet else self._csv(block.file):
                yield Piece(block.file, block.first + first, begin + first, batch)
                first += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise self._told(block.file, error, block.first + first) from error

    def _parquet(self, block: Block) -> Iterator[Any]:
        with _parquet_file(block.file, self.kinds, self._abouts[block.file]) as opened:
            yield from opened.iter_batches(
                batch_size=ROWS, row_groups=[block.group], columns=list(self.schema.columns)
            )

    def _csv(self, file: Path) -> Iterator[Any]:
        yield from _csv_file(file, self.schema, self._csv_types())

    def _csv_types(self) -> dict[str, Any]:
        import pyarrow as pa

        text = pa.dictionary(pa.int32(), pa.string())
        types = dict.fromkeys(self.schema.numeric, pa.float64())
        for name in self.schema.categorical:
            types[name] = text if self.kinds.get(name, "text") == "text" else self._types[name]
        types[self.schema.label] = pa.float64()
        if self.schema.time is not None:
            types[self.schema.time] = self._types[self.schema.time]
        return types

    def _told(self, file: Path, error: Exception, first: int) -> RequestError:
        """What arrow says of a file, in CSV by the name of the column and the row of the data."""
        message = str(error)
        cell, line = _CELL.match(message), _LINE.match(message)
        if not (cell or line):
            return _unreadable(file, error, first)
        if not (cell or line)[2 if cell else 1]:  # type: ignore[index]
            # only a reader that is not threaded counts rows
            again = _exhaust(file, self.schema, self._csv_types() if self._types else {})
            message = message if again is None else again
            cell, line = _CELL.match(message), _LINE.match(message)
        headed = 0 if self.schema.header else 1
        if cell:
            header = _csv_file(file, self.schema, {}, include=False).schema.names
            name = header[int(cell[1])] if int(cell[1]) < len(header) else f"number {cell[1]}"
            value = cell[4].removeprefix("invalid value ").strip("'")
            place = int(cell[2]) - 1 - headed if cell[2] else first
            expected = "a label, 0 or 1" if name == self.schema.label else _expected(cell[3])
            found = Misplaced(name, place, value, expected, str(file))
            if name in self.schema.categorical:
                return RequestError(
                    f'{found}; or read the column as text: text=["{name}"]. So it is if it '
                    "changes its type between files"
                )
            return found
        if line is None or not line[1]:
            return _unreadable(file, error, first)
        row = int(line[1]) - headed
        return RequestError(f"{file}, row {row:,} is no row of CSV: {line[2][:200]}")

    def _check(self) -> None:
        """Columns, types and row groups of every file."""
        blocks: list[Block] = []
        number = 0
        seen: dict[str, tuple[Path, Any]] = {}
        for file in self.files:
            types, groups = self._look(file)
            for name in self.schema.columns:
                if name not in types:
                    raise RequestError(f'{file} has no column "{name}"; {nearest(name, types)}')
                self._agree(name, file, types[name], seen)
            first = 0
            for group, rows in enumerate(groups):
                blocks.append(Block(file, group, first, number, rows))
                first += rows
                number += rows
        self.blocks = tuple(blocks)
        for name, (_, found) in seen.items():
            self._types[name] = found

    def _agree(self, name: str, file: Path, type_: Any, seen: dict[str, tuple[Path, Any]]) -> None:
        import pyarrow as pa

        if pa.types.is_null(type_):
            return
        before = seen.get(name)
        try:
            kind = kind_of(type_)
        except RequestError as error:
            if name in self.schema.categorical:
                raise RequestError(f'the column "{name}" of {file}: {error}') from error
            kind = "integer"
        alike = before is None or kind_of(before[1]) == kind
        if not alike and name not in self.schema.text:
            assert before is not None
            raise RequestError(
                f'the column "{name}" changes its type between files: {before[1]} in {before[0]}, '
                f"{type_} in {file}; make it the same everywhere"
                + (
                    f', or read it as text: text=["{name}"]'
                    if name in self.schema.categorical
                    else ""
                )
            )
        if name in self.schema.categorical:
            self.kinds.setdefault(name, kind or "text")
        elif kind == "text":
            role = "label" if name == self.schema.label else "number or time"
            raise RequestError(
                f'the column "{name}" of {file} holds texts and is given as {role}; correct the '
                "file or the schema"
            )
        if before is None:
            seen[name] = (file, type_)
        elif pa.types.is_floating(type_):
            # whole numbers in one file, with gaps or fractions in another
            seen[name] = (before[0], type_)

    def _look(self, file: Path) -> tuple[dict[str, Any], list[int]]:
        """Types by column, and rows of each row group; 0, not counted, for CSV."""
        import pyarrow as pa

        try:
            if self.parquet:
                with _parquet_file(file, {}) as opened:
                    about, arrow = opened.metadata, opened.schema_arrow
                    self._abouts[file] = about
                    groups = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
                _distinct(file, arrow.names, self.schema)
                return dict(zip(arrow.names, arrow.types, strict=True)), groups
            # the names as they stand, before arrow makes one of two that are alike
            found = _csv_file(file, self.schema, {}, include=False).schema
            _distinct(file, found.names, self.schema)
            return dict(zip(found.names, found.types, strict=True)), [0]
        except (OSError, pa.ArrowException) as error:
            raise self._told(file, error, 0) from error


def column_types(path: str | Path, *, header: Sequence[str] = ()) -> dict[str, Any]:
    """The arrow type of each column of a file, by name. Errors as for ``LogFiles``."""
    import pyarrow as pa

    file = _found(path)[0]
    try:
        if _is(file, PARQUET):
            with _parquet_file(file, {}) as opened:
                found = opened.schema_arrow
        else:
            stand_in = Schema(label="label", categorical=("",), header=tuple(header))
            found = _csv_file(file, stand_in, {}, include=False).schema
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error, 0) from error
    return dict(zip(found.names, found.types, strict=True))


def _found(paths: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    files: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if _is(file, (*PARQUET, *CSV)))
            if not inside:
                raise RequestError(f"the directory {path} holds no Parquet and no CSV file")
            files += inside
        elif not path.is_file():
            raise RequestError(f"there is no file {path}; check the path")
        elif not _is(path, (*PARQUET, *CSV)):
            raise RequestError(
                f"{path} is neither Parquet nor CSV by its name; known: "
                f"{', '.join((*PARQUET, *CSV))}"
            )
        else:
            files.append(path)
    if not files:
        raise RequestError("no files are given to read")
    return tuple(files)


def _is(file: Path, endings: Sequence[str]) -> bool:
    return file.name.lower().endswith(tuple(endings))


def _parquet_file(file: Path, kinds: dict[str, Kind], about: Any = None) -> Any:
    from pyarrow import parquet

    texts = [name for name, kind in kinds.items() if kind == "text"]
    return parquet.ParquetFile(file, read_dictionary=texts, memory_map=True, metadata=about)


def _csv_file(
    file: Path, schema: Schema, types: dict[str, Any], *, include: bool = True, threads: bool = True
) -> Any:
    from pyarrow import csv

    tab = file.name.lower().removesuffix(".gz").endswith((".tsv", ".txt"))
    return csv.open_csv(
        file,
        read_options=csv.ReadOptions(
            use_threads=threads, block_size=_BYTES, column_names=list(schema.header) or None
        ),
        parse_options=csv.ParseOptions(delimiter="\t" if tab else ","),
        convert_options=csv.ConvertOptions(
            column_types=types,
            include_columns=list(schema.columns) if include else None,
            null_values=list(schema.missing),
            strings_can_be_null=True,
            true_values=[],
            false_values=[],
        ),
    )


def _exhaust(file: Path, schema: Schema, types: dict[str, Any]) -> str | None:
    """Read until it fails, without threads: what arrow then says."""
    import pyarrow as pa

    try:
        for _ in _csv_file(file, schema, types, threads=False):
            pass
    except pa.ArrowException as error:
        return str(error)
    return None


def _distinct(file: Path, names: Sequence[str], schema: Schema) -> None:
    for name in schema.columns:
        if list(names).count(name) > 1:
            raise RequestError(f'{file} has two columns "{name}"; rename one')


def _expected(type_: str) -> str:
    if "int" in type_:
        return "a whole number"
    if "float" in type_ or "double" in type_:
        return "a number"
    return "text in UTF-8" if "string" in type_ else f"a value of the type {type_}"


def _unreadable(file: Path, error: Exception, first: int) -> RequestError:
    where = f" after row {first:,}" if first else ""
    return RequestError(f"{file} cannot be read{where}: {str(error).splitlines()[0][:200]}")
