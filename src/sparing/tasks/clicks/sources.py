"""Where rows come from: the package, the retail promotion log, or files of the user's own."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib import resources
from typing import Any, Final

import numpy as np

from sparing.core.errors import RequestError
from sparing.tasks.clicks import promotions
from sparing.tasks.clicks.encoded import Encoded
from sparing.tasks.clicks.files import column_types
from sparing.tasks.clicks.held import Streamed
from sparing.tasks.clicks.options import ClicksOptions
from sparing.tasks.clicks.read import ClickLog, find_schema, label_of, read
from sparing.tasks.clicks.schema import Schema
from sparing.tasks.clicks.split import ByHash, ByTime, Split

BY_WEEK: Final = ByTime(
    start=promotions.START, development=promotions.DEVELOPMENT, test=promotions.TEST
)
WEEKS: Final = (
    "Trained on weeks 2 to 44; development is weeks 45 to 48, test weeks 49 to 53: training never "
    "sees a later week than it is asked about."
)
SAMPLE: Final = (
    "A sample of a retail promotion log: every promotion of one product in twelve, of those "
    "without a purchase one in eight, so that 9.6 % of the rows are positive. "
)


def load(options: ClicksOptions) -> tuple[ClickLog, str]:
    """The rows that the options ask for, encoded, and what to know of them.

    Raises RequestError for files, columns and values that do not fit, and where pyarrow is not
    installed.
    """
    _needs_pyarrow()
    if options.path is not None:
        schema, split = _schema(options), _split(options)
        return _read(options.path, schema, split, options), ""
    if options.dataset == "retail":
        log = promotions.promotions(cut_off=options.cut_off)
        if options.hold == "memory":
            log = replace(log, train=in_memory(log.train), hold="memory")
        return log, f"A retail promotion log. {WEEKS}"
    file = resources.files("sparing.tasks.clicks").joinpath("data", "retail.parquet")
    with resources.as_file(file) as path:
        return _read(path, promotions.SCHEMA, BY_WEEK, options), SAMPLE + WEEKS


def in_memory(data: Encoded | Streamed) -> Encoded:
    """Rows that are mapped from files, read."""
    assert isinstance(data, Encoded)
    return Encoded(
        ids=np.array(data.ids),
        numeric=np.array(data.numeric),
        labels=np.array(data.labels),
        time=np.array(data.time),
        bounds=np.array(data.bounds),
    )


def _read(path: Any, schema: Schema, split: Split, options: ClicksOptions) -> ClickLog:
    chosen = {"cut_off": options.cut_off, "buckets": options.buckets}
    found = read(path, schema, split, hold=options.hold, **chosen)  # type: ignore[arg-type]
    if isinstance(found.train, Streamed):  # samples are asked for one by one, by their number
        found = read(path, schema, split, hold="disk", **chosen)  # type: ignore[arg-type]
    return found


def _schema(options: ClicksOptions) -> Schema:
    assert options.path is not None
    if options.categorical or options.numeric:
        return Schema(
            label=options.label or label_of(column_types(options.path)),
            categorical=options.categorical,
            numeric=options.numeric,
            time=options.time,
            text=options.text,
        )
    return find_schema(options.path, options.label, categorical=options.text, time=options.time)


def _split(options: ClicksOptions) -> Split:
    given = {"development": options.development, "test": options.test}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.time is not None:
        return ByTime(**{name: int(value) for name, value in chosen.items()})
    return ByHash(**chosen)


def _needs_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise RequestError(
            "reading logs of clicks needs pyarrow, which is not installed; "
            'run: pip install "sparing[clicks]"'
        ) from error


def fingerprint(*parts: Encoded) -> str:
    """SHA-256 over the encoded rows: results on other data are not comparable."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.ids.shape} {part.numeric.shape}".encode())
        for start in range(0, len(part), 1 << 20):
            piece = slice(start, start + (1 << 20))
            for array, kind in ((part.ids, "<i4"), (part.numeric, "<f4"), (part.labels, "u1")):
                digest.update(np.ascontiguousarray(array[piece], dtype=kind).data)
    return digest.hexdigest()
