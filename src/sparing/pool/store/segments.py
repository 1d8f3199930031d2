"""Columns on the disk: Parquet files that never change, each with a checksum in the catalogue.

A segment of items has what an append knew; a segment of changes has (change, id, value). Small
ones are merged into larger ones, so that there are few.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.items import KINDS, UNLABELLED
from sparing.pool.store.catalogue import missing

FIXED: Final = {
    "id": "int64",
    "change": "int64",
    "bytes": "int64",
    "named": "uint64",
    "hash": "hash",
    "source": "int32",
    "kind": "int8",
    "key": "str",
}
"""Columns that every item has and that nothing changes."""
BUILT_IN: Final = {"label": "int64", "reason": "int8"}
"""Columns that every store has and that may be changed."""


def arrow() -> Any:
    """The package pyarrow. Raises RequestError that says how to install it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise missing("pyarrow") from error
    return pyarrow


def table(columns: Mapping[str, Any]) -> Any:
    """A table of arrays (n,); (n, 2) of uint64 becomes 16 bytes a row, objects become texts."""
    pa = arrow()
    return pa.table({name: _column(pa, values) for name, values in columns.items()})


def _column(pa: Any, values: Any) -> Any:
    # by their buffers: pyarrow's own conversion imports pandas where that is installed
    n = len(values)
    if isinstance(values, list) or values.dtype.kind in "OU":
        texts = [_utf8(value) for value in values]
        ends = np.zeros(n + 1, np.int64)
        np.cumsum(np.fromiter(map(len, texts), np.int64, n), out=ends[1:])
        data = b"".join(texts)
        return pa.LargeStringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(data))
    if values.dtype.kind == "b":
        return pa.array(values)
    data = pa.py_buffer(np.ascontiguousarray(values))
    if values.ndim == 2:
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n, [None, data])
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), n, [None, data])


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # names of files need not be texts
        return clean(text).encode()


def clean(text: str) -> str:
    """A text that can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def encode(data: Any) -> memoryview:
    """A table as the bytes of a Parquet file; large ones compressed."""
    pa = arrow()
    sink = pa.BufferOutputStream()
    large = data.num_rows > 20_000
    pa.parquet.write_table(
        data,
        sink,
        compression="zstd" if large else "none",
        use_dictionary=large,
        write_statistics=large,
    )
    return memoryview(sink.getvalue())


def decode(data: Any, names: Sequence[str] | None = None) -> Any:
    """The table of a file's bytes, or those of its columns that it has."""
    pa = arrow()
    file = pa.parquet.ParquetFile(pa.BufferReader(data))
    chosen = None
    if names is not None:
        chosen = [name for name in names if name in file.schema_arrow.names]
        if not chosen:
            chosen = ["id"]
    return file.read(columns=chosen, use_threads=False)


def concatenate(tables: Iterable[Any]) -> Any:
    """One table of many; a column that some lack is empty there."""
    return arrow().concat_tables(list(tables), promote_options="default").combine_chunks()


def values_of(data: Any, name: str, dtype: str) -> NDArray[Any]:
    """A column as an array (n,), its ``default`` where a row has none; (n, 2) for hashes."""
    n = data.num_rows
    if name not in data.column_names:
        return np.full(n, default(name, dtype), numpy_type(dtype))
    column = data.column(name).combine_chunks()
    if dtype == "hash":
        if not n:
            return np.zeros((0, 2), np.uint64)
        begin = column.offset * 16
        buffer = column.buffers()[1]
        return np.frombuffer(buffer, "<u8", 2 * n, begin).reshape(n, 2)
    if column.null_count:
        column = column.fill_null(default(name, dtype))
    out: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return out.astype(numpy_type(dtype), copy=False)


def default(name: str, dtype: str) -> Any:
    """What an item has that was given no value: NaN, -1, False or an empty text; kept, a reason."""
    if name == "reason":
        return 0
    kind = numpy_type(dtype).kind
    return {"f": np.nan, "i": UNLABELLED, "u": 0, "b": False, "O": ""}[kind]


def numpy_type(dtype: str) -> np.dtype[Any]:
    """The type of arrays of a column that the catalogue calls so."""
    return np.dtype(object if dtype == "str" else dtype)


def checked(name: str, values: Any, known: str | None, n: int) -> tuple[NDArray[Any], str]:
    """Values (n,) in the column's type, and its name for the catalogue.

    The first values that a column gets decide on its type. Raises RequestError for a bad name, a
    wrong length, or values that the type does not hold.
    """
    if name in FIXED or not name.isidentifier() or len(name) > 64:
        why = "is fixed once an item is stored" if name in FIXED else "is no name of a column"
        raise RequestError(f'"{name}" {why}; choose another name, letters, digits and "_"')
    array = np.asarray(values)
    if array.shape != (n,):
        raise RequestError(f'column "{name}" needs {n} values, got shape {array.shape}')
    if array.dtype.kind == "U" or (
        array.dtype.kind == "O" and all(isinstance(value, str) for value in array)
    ):
        array, found = array.astype(object), "str"
    elif array.dtype.kind in "biuf" and array.dtype.itemsize <= 8:
        found = array.dtype.name
    else:
        raise RequestError(
            f'column "{name}" holds numbers, truth values or texts, not {array.dtype}'
        )
    if known is None or known == found:
        return array, known or found
    if "str" in (known, found):
        raise RequestError(f'column "{name}" holds {known}, got {found}')
    with np.errstate(all="ignore"):
        cast = array.astype(known)
    floats = np.dtype(known).kind == "f" and array.dtype.kind == "f"
    if not floats and not np.array_equal(cast, array):
        raise RequestError(f'column "{name}" holds {known}, which these {found} do not fit into')
    return cast, known


def kind_names(values: NDArray[np.int8]) -> NDArray[Any]:
    """Kinds by name."""
    out: NDArray[Any] = np.array(KINDS, object)[values]
    return out
