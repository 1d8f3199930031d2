"""Categories as whole numbers: which value has which id, fitted in one pass, kept with the model.

In each field id 0 is a missing value and id 1 one that the vocabulary does not hold; ids from 2 on
are the values, most frequent first, or hash buckets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown
from sparing.core.state import atomic_write_json, complete, replacing
from sparing.tasks.clicks.columns import (
    Kind,
    arrow,
    integers,
    kind_of,
    string_array,
    string_parts,
    texts,
)
from sparing.tasks.clicks.counting import Counter
from sparing.tasks.clicks.lookup import Lookup, mix, text_hashes
from sparing.tasks.clicks.scaling import Moments, Rule, Scale

FORMAT: Final = 1
MISSING: Final = 0
UNSEEN: Final = 1
FIRST: Final = 2
"""The id of a field's most frequent value, or of its first bucket."""
_ROUND: Final = 1 << 13
"""Rows of all columns put beside each other at a time."""


@final
class Field:
    """One categorical column: ``size`` ids, from 0 on.

    ``values``: (n,) int64, or an arrow string array, in the order of their ids; None for hashing
    into ``buckets``. ``counts``: (n,) int64, how often each occurred; ``missing`` and ``rare``, how
    many values were missing, and how many occurred less often than the cut-off allows.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        *,
        values: Any = None,
        counts: NDArray[np.int64] | None = None,
        buckets: int = 0,
        missing: int = 0,
        rare: int = 0,
    ) -> None:
        self.name, self.kind, self.buckets = name, kind, buckets
        self.missing, self.rare = missing, rare
        self.values = values
        self.counts = np.zeros(0, dtype=np.int64) if counts is None else counts
        self.size = FIRST + (buckets or len(values))
        self._salt = 0
        if not buckets and kind == "integer":
            self._lookup = Lookup(values)
        elif not buckets:
            self._lookup = Lookup(self._distinct_hashes().view(np.int64))

    def encode(self, column: Any) -> NDArray[np.int64]:
        """Ids of an arrow array, numpy array or list, (n,) int64.

        Raises Misplaced for a value that is no whole number in a field of whole numbers.
        """
        return self.codes(column).astype(np.int64)

    def codes(self, column: Any) -> NDArray[np.int32]:
        """``encode`` in 32 bits, as ids are stored."""
        column = arrow(column)
        if self.kind == "integer":
            if kind_of(column.type) == "text":
                raise RequestError(
                    f'the column "{self.name}" holds texts, and whole numbers when its vocabulary '
                    "was made; give whole numbers, or make a vocabulary of texts: text=[...]"
                )
            numbers, there = integers(column, self.name)
            if self.buckets:
                found = self._bucket(mix(numbers))
            else:
                found = self._lookup.find(numbers)
                found += FIRST
            if there is not None:
                found[~there] = MISSING
            return found
        import pyarrow as pa

        if kind_of(column.type) == "integer":
            column = column.cast(pa.string())
        codes, values = texts(column)
        ids = np.append(self._text_ids(values), np.int32(MISSING))
        # the code of what is missing is -1, which is the last entry
        return ids.take(codes)

    def _text_ids(self, values: Any) -> NDArray[np.int32]:
        hashes = text_hashes(*string_parts(values), salt=self._salt)
        if self.buckets:
            return self._bucket(hashes)
        found = self._lookup.find(hashes.view(np.int64))
        if len(self.values):
            import pyarrow.compute as pc

            # the same hash does not prove the same text
            same = pc.equal(self.values.take(np.maximum(found, 0)), values)
            found[~same.to_numpy(zero_copy_only=False)] = UNSEEN - FIRST
        return found + np.int32(FIRST)

    def _bucket(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        return (hashes % np.uint64(self.buckets)).astype(np.int32) + np.int32(FIRST)

    def _distinct_hashes(self) -> NDArray[np.uint64]:
        while True:
            hashes = text_hashes(*string_parts(self.values), salt=self._salt)
            if len(np.unique(hashes)) == len(hashes):
                return hashes
            self._salt += 1


@final
@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The fields of a log and the scales of its numbers; made by ``fit`` or ``load``."""

    fields: tuple[Field, ...]
    scales: tuple[Scale, ...] = ()

    def __getitem__(self, name: str) -> Field:
        for field in self.fields:
            if field.name == name:
                return field
        raise unknown("field", name, [field.name for field in self.fields])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ids of each field, missing and unseen among them."""
        return tuple(field.size for field in self.fields)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each field's rows begin in one table of all fields, (F,) int64."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)[: len(self.sizes)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides what is encoded as what."""
        digest = hashlib.sha256()
        for field in self.fields:
            digest.update(repr((field.name, field.kind, field.buckets, field.size)).encode())
            if field.buckets:
                continue
            if field.kind == "integer":
                digest.update(field.values.tobytes())
            else:
                content, ends = string_parts(field.values)
                digest.update(content[ends[0] : ends[-1]].tobytes())
                digest.update((ends - ends[0]).tobytes())
        digest.update(repr(self.scales).encode())
        return digest.hexdigest()

    def encode(self, columns: Any) -> NDArray[np.int64]:
        """Ids per field, (n, F) int64; ``columns`` gives a column by its name.

        A mapping, an arrow batch or table. Raises Misplaced as ``Field.encode``, RequestError for
        columns that are not there or not equally long.
        """
        return self.codes(columns).astype(np.int64)

    def codes(self, columns: Any) -> NDArray[np.int32]:
        """``encode`` in 32 bits."""
        if not self.fields:
            return np.zeros((len(_column(columns, self.scales[0].name)), 0), dtype=np.int32)
        found = [field.codes(_column(columns, field.name)) for field in self.fields]
        names = [field.name for field in self.fields]
        return _beside(found, names, np.dtype(np.int32), _rows(columns))

    def numeric(self, columns: Any) -> NDArray[np.float32]:
        """Scaled numbers, (n, D) float32, 0 where missing. Raises Misplaced for infinities."""
        if not self.scales:
            return np.zeros((len(_column(columns, self.fields[0].name)), 0), dtype=np.float32)
        found = [scale.apply(_column(columns, scale.name)) for scale in self.scales]
        names = [scale.name for scale in self.scales]
        return _beside(found, names, np.dtype(np.float32), _rows(columns))

    @classmethod
    def fit(
        cls,
        batches: Iterable[Any],
        categorical: Sequence[str],
        numeric: Sequence[str] = (),
        *,
        text: Sequence[str] = (),
        cut_off: int = 1,
        buckets: int | Mapping[str, int] = 0,
        scaling: Rule = "standard",
    ) -> Vocabulary:
        """One pass over the training rows; see ``Fitting`` for the options and errors."""
        fitting = Fitting(
            categorical, numeric, text=text, cut_off=cut_off, buckets=buckets, scaling=scaling
        )
        for batch in batches:
            fitting.add(batch)
        return fitting.done()

    def save(self, path: str | Path) -> None:
        """Write ``vocabulary.json`` and ``values.npz`` into the directory ``path``, whole or not.

        Raises RunError if it cannot be written.
        """
        arrays: dict[str, NDArray[Any]] = {}
        told = []
        for number, field in enumerate(self.fields):
            about = {"name": field.name, "kind": field.kind, "buckets": field.buckets}
            told.append({**about, "missing": field.missing, "rare": field.rare})
            if field.buckets:
                continue
            arrays[f"{number}.counts"] = field.counts
            if field.kind == "integer":
                arrays[f"{number}.values"] = field.values
            else:
                content, ends = string_parts(field.values)
                arrays[f"{number}.content"] = content[ends[0] : ends[-1]]
                arrays[f"{number}.ends"] = ends - ends[0]
        with replacing(path) as aside:
            np.savez(aside / "values.npz", **arrays)  # type: ignore[arg-type]
            about = {"format": FORMAT, "values": _digest(aside / "values.npz"), "fields": told}
            scales = [asdict(scale) for scale in self.scales]
            atomic_write_json(aside / "vocabulary.json", {**about, "scales": scales})

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """What ``save`` wrote. Raises RequestError where it is missing, damaged or too new."""
        path = complete(path)
        try:
            about = json.loads((path / "vocabulary.json").read_text(encoding="utf-8"))
            if about["format"] > FORMAT:
                raise RequestError(
                    f"{path} has format {about['format']}, this version reads up to {FORMAT}; "
                    "update sparing"
                )
            if _digest(path / "values.npz") != about["values"]:
                raise RequestError(f"values.npz in {path} does not match its checksum; copy again")
            with np.load(path / "values.npz", allow_pickle=False) as arrays:
                fields = [_field(arrays, i, told) for i, told in enumerate(about["fields"])]
            return cls(tuple(fields), tuple(Scale(**scale) for scale in about["scales"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"there is no whole vocabulary in {path}: {error!r}") from error


@final
class Fitting:
    """A vocabulary in the making, fed by ``add``.

    ``text``: fields that are texts though they may look like whole numbers. ``cut_off``: values
    that occur less often are unseen. With 1 nothing in the training rows is unseen, so that the
    row of that id in a table is never trained; from 2 on it is. ``buckets``: hash into this many
    ids instead of counting, for all fields or by name; 0 for a vocabulary. Hashes are the same on
    every machine. ``scaling``: of numbers, see ``Scale``.
    """

    def __init__(
        self,
        categorical: Sequence[str],
        numeric: Sequence[str] = (),
        *,
        text: Sequence[str] = (),
        cut_off: int = 1,
        buckets: int | Mapping[str, int] = 0,
        scaling: Rule = "standard",
    ) -> None:
        require_whole("cut_off", cut_off, 1)
        by_name = buckets if isinstance(buckets, Mapping) else dict.fromkeys(categorical, buckets)
        for name, count in by_name.items():
            if name not in categorical:
                raise unknown("field with buckets", name, categorical)
            require_whole(f"buckets of {name}", count, 0)
        self._cut_off, self._buckets = cut_off, dict(by_name)
        self._kinds: dict[str, Kind] = dict.fromkeys(text, "text")
        self._counters = {name: Counter(name) for name in categorical}
        self._moments = [Moments(name, scaling) for name in numeric]

    def add(self, columns: Any, kept: NDArray[np.bool_] | None = None) -> None:
        """Take in one batch, or the rows of it that are ``kept``, (n,) bool.

        Raises Misplaced for a value that is no category or no number, RequestError for a column
        whose type is another than in the batches before.
        """
        for name, counter in self._counters.items():
            column = _column(columns, name)
            found = kind_of(column.type)
            kind = self._kinds.setdefault(name, found) if found else self._kinds.get(name)
            if found == "text" and kind == "integer":
                raise RequestError(
                    f'the column "{name}" holds texts, and whole numbers in the rows before; make '
                    f'its type the same everywhere, or read it as text: text=["{name}"]'
                )
            if found == "integer" and kind == "text":
                column = column.cast("string")
            if kept is not None:
                column = column.filter(kept)
            if kind is None or self._buckets.get(name):
                counter.missing += column.null_count
            else:
                counter.add(column, kind)
        for moments in self._moments:
            column = _column(columns, moments.name)
            moments.add(column if kept is None else column.filter(kept))

    def done(self) -> Vocabulary:
        """The vocabulary of all that was added; a column that was always missing has two ids."""
        fields = []
        for name, counter in self._counters.items():
            kind = self._kinds.get(name, "integer")
            buckets = self._buckets.get(name, 0)
            if buckets:
                fields.append(Field(name, kind, buckets=buckets, missing=counter.missing))
                continue
            fields.append(counted_field(counter, kind, self._cut_off))
        return Vocabulary(tuple(fields), tuple(m.scale() for m in self._moments))


def counted_field(counter: Counter, kind: Kind, cut_off: int = 1) -> Field:
    """The field of all counted values that occur at least ``cut_off`` times."""
    values, counts = counter.counted()
    if kind == "text" and not len(values):
        values = string_array(np.zeros(0, np.uint8), np.zeros(1, np.int64))
    # the most frequent come first
    held = int((counts >= cut_off).sum())
    return Field(
        counter.name,
        kind,
        values=values[:held],
        counts=counts[:held],
        missing=counter.missing,
        rare=int(counts[held:].sum()),
    )


def _column(columns: Any, name: str) -> Any:
    try:
        return arrow(columns[name])
    except KeyError as error:
        raise RequestError(f'there is no column "{name}" in what is to be encoded') from error


def _rows(columns: Any) -> int:
    """How many rows there are, where none of the columns is wanted too."""
    if isinstance(columns, Mapping):
        return len(next(iter(columns.values()), ()))
    return int(columns.num_rows)


def _beside(
    found: Sequence[NDArray[Any]], names: Sequence[str], dtype: Any, rows: int
) -> NDArray[Any]:
    rows = len(found[0]) if found else rows
    for name, column in zip(names, found, strict=True):
        if len(column) != rows:
            raise RequestError(
                f'the column "{name}" has {len(column)} rows and "{names[0]}" has {rows}'
            )
    stacked = np.empty((rows, len(found)), dtype=dtype)
    # a part at a time, which stays in the processor's caches until each column is in it
    for start in range(0, rows, _ROUND):
        part = slice(start, start + _ROUND)
        for place, column in enumerate(found):
            stacked[part, place] = column[part]
    return stacked


def _field(arrays: Any, number: int, told: Mapping[str, Any]) -> Field:
    if told["buckets"]:
        return Field(**told)
    if told["kind"] == "integer":
        values = arrays[f"{number}.values"]
    else:
        values = string_array(arrays[f"{number}.content"], arrays[f"{number}.ends"])
    return Field(**told, values=values, counts=arrays[f"{number}.counts"])


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
