"""A log of clicks, from files to rows that can be trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.cache import cache_folder
from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown
from sparing.core.state import complete, replacing
from sparing.tasks.clicks.columns import kind_of
from sparing.tasks.clicks.encoded import Encoded
from sparing.tasks.clicks.files import LogFiles, column_types
from sparing.tasks.clicks.held import Streamed, in_memory, on_disk
from sparing.tasks.clicks.scaling import Rule
from sparing.tasks.clicks.schema import Schema
from sparing.tasks.clicks.split import PARTS, Split
from sparing.tasks.clicks.survey import Survey, survey
from sparing.tasks.clicks.vocabulary import Vocabulary

FORMAT: Final = 1
Hold = Literal["auto", "memory", "disk", "stream"]
HOLDS: Final = ("auto", "memory", "disk", "stream")
LABELS: Final = ("label", "click", "clicks", "clicked", "is_click", "target", "converted", "y")
_FEW: Final = 32
"""With fewer row groups than this, reading them in random order does not mix rows well enough."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ClickLog:
    """The parts of a log, encoded by the vocabulary of its training rows.

    ``development`` and ``test`` are None where the split wants none; all are ``Encoded`` but for a
    training part that is streamed. ``hold`` tells how the training rows are held.
    """

    schema: Schema
    vocabulary: Vocabulary
    train: Encoded | Streamed
    development: Encoded | None
    test: Encoded | None
    hold: Hold


def read(
    paths: str | Path | Sequence[str | Path],
    schema: Schema,
    split: Split,
    *,
    vocabulary: Vocabulary | None = None,
    cut_off: int = 1,
    buckets: int | Mapping[str, int] = 0,
    scaling: Rule = "standard",
    hold: Hold = "auto",
    memory: int = 2 << 30,
    block: int = 1 << 16,
    cache: str | Path | None = None,
) -> ClickLog:
    """Read Parquet or CSV files, a directory of them, or several.

    A first pass splits the rows and makes the vocabulary of the training rows alone, unless one is
    given; ``cut_off``, ``buckets`` and ``scaling`` are ``Fitting``'s. ``hold`` says what becomes
    of the training rows: ``memory`` keeps them encoded (4 bytes a category and a number, 9 a row);
    ``disk`` writes them so into ``cache`` once, shuffled into shards of about ``block`` rows, and
    maps them; ``stream`` decodes row groups of Parquet in every epoch. ``auto``: memory if they
    take at most ``memory`` bytes; else ``stream``, if the files have at least 32 row groups that
    are not sorted by time; else ``disk``. Held-out rows are in memory, or on disk with the others.
    CSV is parsed once if what is parsed takes at most ``memory`` bytes, and twice otherwise.

    The cache is found again by the names, sizes and times of change of the files and by every
    option here. Ranks of one machine must not write the same cache at once: let one read first.

    Raises RequestError for files, columns and values that do not fit (column, file, row and value
    are named), and for a part that has no rows; RunError if the cache cannot be written.
    """
    if hold not in HOLDS:
        raise unknown("way to hold rows", hold, HOLDS)
    require_whole("memory", memory, 0)
    require_whole("block", block, 1)
    files = LogFiles(paths, schema)
    if hold == "stream" and not files.parquet:
        raise RequestError("CSV cannot be streamed in random order: take hold=disk or memory")
    options = {"cut_off": cut_off, "buckets": buckets, "scaling": scaling}
    place = Path(cache) if cache is not None else cache_folder() / "clicks"
    kept = place / _key(files, split, vocabulary, options, block)
    if hold in ("auto", "disk"):
        found = cached(kept, schema)
        if found is not None:
            return found
    files.keep(memory)
    seen = survey(files, split, vocabulary, cut_off=cut_off, buckets=buckets, scaling=scaling)
    counts = seen.parts.sum(0)
    _all_there(counts, split, seen)
    chosen = _hold(files, seen, memory) if hold == "auto" else hold
    if chosen == "disk":
        with replacing(kept) as aside:
            seen.vocabulary.save(aside / "vocabulary")
            on_disk(files, split, seen, aside, block)
        written = cached(kept, schema)
        assert written is not None
        return written
    parts = in_memory(files, split, seen, block, train=chosen == "memory")
    train = parts[0] or Streamed(files, split, seen.vocabulary, seen.parts[:, 0])
    return ClickLog(
        schema=schema,
        vocabulary=seen.vocabulary,
        train=train,
        development=parts[1],
        test=parts[2],
        hold=chosen,
    )


def find_schema(
    path: str | Path,
    label: str | None = None,
    *,
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    time: str | None = None,
    header: Sequence[str] = (),
) -> Schema:
    """A schema with the columns that a file has, by the types it has them with.

    Texts, whole numbers and truth values become categorical, numbers with a point numeric, and
    all else (dates, lists) is left out, unless ``categorical`` and ``numeric`` say otherwise: name
    counts there, which look like ids. The time column is left out of the features, since what
    is held out by time has values of it that training has not. Without ``label`` it is the one
    column that is called as labels are (``LABELS``).

    Raises RequestError if the label is not there, or nothing to learn from.
    """
    import pyarrow as pa

    types = column_types(path, header=header)
    if label is None:
        label = label_of(types)
    for name in (label, *categorical, *numeric, *(() if time is None else (time,))):
        if name not in types:
            raise unknown("column", name, types)
    said = {label, time, *categorical, *numeric}
    found: dict[str, list[str]] = {"categorical": [*categorical], "numeric": [*numeric]}
    for name, type_ in types.items():
        if name in said:
            continue
        if pa.types.is_floating(type_) or pa.types.is_decimal(type_):
            found["numeric"].append(name)
        elif not (pa.types.is_temporal(type_) or pa.types.is_null(type_)):
            try:
                kind_of(type_)
            except RequestError:
                continue
            found["categorical"].append(name)
    return Schema(
        label=label,
        categorical=tuple(found["categorical"]),
        numeric=tuple(found["numeric"]),
        time=time,
        header=tuple(header),
    )


def label_of(columns: Iterable[str]) -> str:
    """The one column that is called as labels are; RequestError if none is, or several are."""
    columns = list(columns)
    likely = [name for name in columns if name.lower() in LABELS]
    if len(likely) == 1:
        return likely[0]
    why = f"{' and '.join(likely)} may be it" if likely else f"none is called {LABELS[0]} or alike"
    raise RequestError(
        "label must name the column of 0 and 1 that is to be predicted; of the columns "
        f"{', '.join(columns)} {why}"
    )


def _all_there(counts: NDArray[np.int64], split: Split, seen: Survey) -> None:
    for part, count, wanted in zip(PARTS, counts, split.wanted, strict=True):
        if wanted and not count:
            times = f"times from {seen.low} to {seen.high}" if seen.timed else "no times"
            raise RequestError(
                f"the split leaves the {part} part empty: of {seen.rows:,} rows, with {times}, "
                f"{split} puts "
                + ", ".join(f"{n:,} into {p}" for p, n in zip(PARTS, counts, strict=True))
                + "; move its bounds or shares"
            )


def _hold(files: LogFiles, seen: Survey, memory: int) -> Hold:
    fields, numbers = len(seen.vocabulary.fields), len(seen.vocabulary.scales)
    if int(seen.parts[:, 0].sum()) * (4 * fields + 4 * numbers + 9) <= memory:
        return "memory"
    return "stream" if files.parquet and len(files.blocks) >= _FEW and not seen.ordered else "disk"


def _key(
    files: LogFiles,
    split: Split,
    vocabulary: Vocabulary | None,
    options: Mapping[str, Any],
    block: int,
) -> str:
    """What the cached rows depend on."""
    about = {
        "format": FORMAT,
        "files": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files.files],
        "schema": asdict(files.schema),
        "split": repr(split),
        "options": options,
        "vocabulary": None if vocabulary is None else vocabulary.fingerprint,
        "block": block,
    }
    text = json.dumps(about, sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def cached(place: Path, schema: Schema) -> ClickLog | None:
    """What is in the cache, None if nothing whole is."""
    place = complete(place)
    try:
        vocabulary = Vocabulary.load(place / "vocabulary")
        train, *held_out = (
            Encoded.load(place / part, mapped=True) if (place / part).is_dir() else None
            for part in PARTS
        )
    except (OSError, ValueError):
        return None
    if train is None:
        return None
    return ClickLog(
        schema=schema,
        vocabulary=vocabulary,
        train=train,
        development=held_out[0],
        test=held_out[1],
        hold="disk",
    )
