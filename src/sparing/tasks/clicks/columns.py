"""Columns of arrow, checked, as numpy arrays. Nothing is imported here before a column is there."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError

Kind = Literal["integer", "text"]
_SHOWN = 40


def kind_of(type_: Any) -> Kind | None:
    """How a categorical column of this arrow type is read: None if it tells nothing, all null.

    Raises RequestError for a type whose values cannot be categories.
    """
    import pyarrow as pa

    if pa.types.is_null(type_):
        return None
    if pa.types.is_dictionary(type_):
        return kind_of(type_.value_type)
    if _texts(type_):
        return "text"
    # floats: whole numbers with gaps come so from pandas
    if (
        pa.types.is_integer(type_)
        or pa.types.is_boolean(type_)
        or pa.types.is_floating(type_)
        or pa.types.is_date(type_)
        or pa.types.is_timestamp(type_)
    ):
        return "integer"
    raise RequestError(f"values of the type {type_} cannot be categories")


def arrow(column: Any) -> Any:
    """One arrow array of what may be in chunks, a numpy array, or a list."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    elif isinstance(column, np.ndarray):
        column = pa.array(column, from_pandas=True)
    elif not isinstance(column, pa.Array):
        column = pa.array(column)
    type_ = column.type
    if pa.types.is_dictionary(type_):
        # a column of chosen numbers is read as numbers
        return column if _texts(type_.value_type) else arrow(column.cast(type_.value_type))
    if _texts(type_) and not pa.types.is_string(type_):
        return column.cast(pa.string())
    return column


def _texts(type_: Any) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_string_view(type_)
        or pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_)
    )


def present(column: Any) -> NDArray[np.bool_] | None:
    """Where a value is there, (n,) bool; None if it is everywhere."""
    if not column.null_count:
        return None
    return np.asarray(column.is_valid().to_numpy(zero_copy_only=False))


def integers(column: Any, name: str) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """(n,) int64 with 0 for what is missing, and where it is not missing.

    Raises Misplaced for fractions and for numbers beyond 64 bits.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    type_ = column.type
    if pa.types.is_null(type_):
        return np.zeros(len(column), dtype=np.int64), np.zeros(len(column), dtype=np.bool_)
    if pa.types.is_floating(type_):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, type_), column)
    there = present(column)
    if pa.types.is_date32(type_):
        column = column.cast(pa.int32())
    try:
        whole = column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        values = column.to_numpy(zero_copy_only=False).astype(np.float64)
        bad = ~(np.isnan(values) | ((np.floor(values) == values) & (np.abs(values) < 2**63)))
        if not bad.any():
            raise RequestError(f'the column "{name}" cannot be read: {error}') from error
        raise Misplaced(
            name, int(bad.argmax()), column[int(bad.argmax())].as_py(), "a whole number of 64 bits"
        ) from error
    if there is not None:
        whole = whole.fill_null(0)
    return np.asarray(whole.to_numpy(zero_copy_only=False)), there


def texts(column: Any) -> tuple[NDArray[np.int32], Any]:
    """(n,) int32 positions in the values, -1 for missing; and the values, a string array.

    A value may be there more than once, or not occur at all.
    """
    import pyarrow as pa

    if pa.types.is_null(column.type):
        return np.full(len(column), -1, dtype=np.int32), pa.array([], pa.string())
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    values = column.dictionary
    if not pa.types.is_string(values.type):
        values = values.cast(pa.string())
    position = column.indices
    if position.null_count:
        position = position.cast(pa.int32()).fill_null(-1)
    if values.null_count:
        # a dictionary may hold null itself
        there = values.is_valid().to_numpy(zero_copy_only=False)
        codes = position.to_numpy(zero_copy_only=False).astype(np.int32)
        codes[(codes >= 0) & ~there[codes]] = -1
        return codes, values.fill_null("")
    return np.asarray(position.to_numpy(zero_copy_only=False)).astype(np.int32, copy=False), values


def string_parts(values: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Bytes and offsets, (n + 1,) int64, of a string array without nulls."""
    _, offsets, content = values.buffers()
    if not len(values):
        return np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    ends = np.frombuffer(offsets, dtype=np.int32)[values.offset : values.offset + len(values) + 1]
    whole = np.frombuffer(content, dtype=np.uint8) if content is not None else None
    return np.zeros(0, np.uint8) if whole is None else whole, ends.astype(np.int64)


def string_array(content: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Any:
    """The string array of those bytes; the inverse of ``string_parts``."""
    import pyarrow as pa

    narrow = offsets.astype(np.int32)
    return pa.StringArray.from_buffers(
        len(offsets) - 1, pa.py_buffer(narrow), pa.py_buffer(content)
    )


def floats(column: Any, name: str) -> NDArray[np.float64]:
    """(n,) float64, NaN for what is missing. Raises Misplaced for infinities."""
    import pyarrow as pa

    type_ = column.type
    if pa.types.is_null(type_):
        return np.full(len(column), np.nan)
    if not (
        pa.types.is_integer(type_)
        or pa.types.is_floating(type_)
        or pa.types.is_decimal(type_)
        or pa.types.is_boolean(type_)
    ):
        raise RequestError(
            f'the column "{name}" holds {type_} and is given as numeric; give it as categorical'
        )
    if pa.types.is_boolean(type_):
        column = column.cast(pa.uint8())
    values = np.asarray(
        column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64
    )
    bad = np.isinf(values)
    if bad.any():
        raise Misplaced(
            name, int(bad.argmax()), column[int(bad.argmax())].as_py(), "a finite number"
        )
    return values


def labels(column: Any, name: str) -> NDArray[np.uint8]:
    """(n,) uint8, 0 or 1. Raises Misplaced for anything else, a missing label too."""
    import pyarrow as pa

    expected = "a label, 0 or 1"
    if column.null_count:
        gap = ~column.is_valid().to_numpy(zero_copy_only=False)
        raise Misplaced(name, int(gap.argmax()), None, expected)
    type_ = column.type
    if pa.types.is_boolean(type_):
        column = column.cast(pa.uint8())
    elif not (pa.types.is_integer(type_) or pa.types.is_floating(type_)):
        raise Misplaced(name, 0, column[0].as_py() if len(column) else None, expected)
    values = column.to_numpy(zero_copy_only=False)
    narrow: NDArray[np.uint8] = (values == 1).astype(np.uint8)
    bad = values != narrow
    if bad.any():
        raise Misplaced(name, int(bad.argmax()), column[int(bad.argmax())].as_py(), expected)
    return narrow


def times(column: Any, name: str) -> NDArray[np.int64]:
    """(n,) int64: whole numbers as they are, dates in days, points in time in seconds since 1970.

    Raises Misplaced for a missing one.
    """
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    elif pa.types.is_date64(column.type):
        column = column.cast(pa.date32())
    elif not (
        pa.types.is_date32(column.type)
        or pa.types.is_integer(column.type)
        or pa.types.is_floating(column.type)
    ):
        raise RequestError(
            f'the column "{name}" holds {column.type} and is given as time: give whole numbers, '
            "dates or timestamps"
        )
    values, there = integers(column, name)
    if there is not None and not there.all():
        raise Misplaced(name, int((~there).argmax()), None, "a time")
    return values


class Misplaced(RequestError):
    """A value that does not belong in its column; ``row`` counts from the array's first, 0."""

    def __init__(self, column: str, row: int, value: object, expected: str, file: str = "") -> None:
        self.column, self.row, self.value, self.expected = column, row, value, expected
        told = repr(value)
        shown = told if len(told) <= _SHOWN else told[:_SHOWN] + "…"
        super().__init__(
            f'column "{column}", row {row + 1:,}{file and f" of {file}"}: {shown} is not '
            f"{expected}; correct it, or leave such rows out"
        )
