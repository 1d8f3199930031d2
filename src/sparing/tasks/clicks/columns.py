"""Columns of arrow, checked, as numpy arrays. Nothing is imported here before a column is there."""

from __future__ import annotations

from collections.abc import Sequence
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
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
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
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(column, pa.Array):
        return column
    if isinstance(column, np.ndarray):
        return pa.array(column, from_pandas=True)
    return pa.array(column)


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

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
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
        raise Misplaced(name, int(bad.argmax()), column, "a whole number of 64 bits") from error
    if there is not None:
        whole = whole.fill_null(0)
    return np.asarray(whole.to_numpy(zero_copy_only=False)), there


def texts(column: Any) -> tuple[NDArray[np.int32], Any]:
    """Distinct values: (n,) int32 positions in them, -1 for missing, and the values, a string array.

    A value may be there more than once, or not occur at all.
    """
    import pyarrow as pa

    if pa.types.is_null(column.type):
        return np.full(len(column), -1, dtype=np.int32), pa.array([], pa.string())
    if not pa.types.is_dictionary(column.type):
        if not pa.types.is_string(column.type):
            column = column.cast(pa.string())
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
    return pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(narrow), pa.py_buffer(content))


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
        raise Misplaced(name, int(bad.argmax()), column, "a finite number")
    return values


def labels(column: Any, name: str) -> NDArray[np.uint8]:
    """(n,) uint8, 0 or 1. Raises Misplaced for anything else, a missing label too."""
    import pyarrow as pa

    expected = "a label, 0 or 1"
    if column.null_count:
        gap = ~column.is_valid().to_numpy(zero_copy_only=False)
        raise Misplaced(name, int(gap.argmax()), column, expected)
    type_ = column.type
    if pa.types.is_boolean(type_):
        column = column.cast(pa.uint8())
    elif not (pa.types.is_integer(type_) or pa.types.is_floating(type_)):
        raise Misplaced(name, 0, column, expected)
    values = column.to_numpy(zero_copy_only=False)
    narrow = values.astype(np.uint8) if values.dtype.kind in "iub" else (values == 1).view(np.uint8)
    bad = (values != narrow) | (narrow > 1)
    if bad.any():
        raise Misplaced(name, int(bad.argmax()), column, expected)
    return narrow


class Misplaced(RequestError):
    """A value that does not belong in its column; ``row`` counts from the array's first, 0."""

    def __init__(self, column: str, row: int, array: Any, expected: str, where: str = "") -> None:
        self.column, self.row, self.array, self.expected = column, row, array, expected
        value = array[row].as_py() if row < len(array) else None
        told = repr(value)
        shown = told if len(told) <= _SHOWN else told[:_SHOWN] + "…"
        super().__init__(
            f'column "{column}", row {row + 1:,}{where}: {shown} is not {expected}; correct it, '
            "or leave such rows out"
        )

    def at(self, first: int, file: str) -> Misplaced:
        """The same, told as a row of ``file``, whose row ``first`` is the array's first."""
        moved = Misplaced.__new__(Misplaced)
        moved.column, moved.row, moved.array = self.column, self.row, self.array
        moved.expected = self.expected
        told = str(self).replace(f"row {self.row + 1:,}", f"row {first + self.row + 1:,} of {file}")
        RequestError.__init__(moved, told)
        return moved


def names(sequence: Sequence[str]) -> str:
    """A few names for a message."""
    some = ", ".join(sequence[:8])
    return some + (", …" if len(sequence) > 8 else "")
