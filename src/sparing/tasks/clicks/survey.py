"""The first pass over a log: its vocabulary, and how many rows of each part each block has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from sparing.tasks.clicks.columns import arrow, labels
from sparing.tasks.clicks.encoded import telling, time_of
from sparing.tasks.clicks.files import LogFiles, Piece
from sparing.tasks.clicks.scaling import Rule
from sparing.tasks.clicks.schema import Schema
from sparing.tasks.clicks.split import LEFT_OUT, PARTS, Split
from sparing.tasks.clicks.vocabulary import Fitting, Vocabulary


@final
@dataclass(frozen=True, slots=True)
class Survey:
    """``parts``, (K, 3) int64: rows of each block in each part of the split.

    ``rows`` of the whole log, left out or not; ``low`` and ``high``, the times of it; ``ordered``,
    whether the blocks follow each other in time.
    """

    vocabulary: Vocabulary
    parts: NDArray[np.int64]
    rows: int
    timed: bool
    low: int
    high: int
    ordered: bool


def survey(
    files: LogFiles,
    split: Split,
    vocabulary: Vocabulary | None = None,
    *,
    cut_off: int = 1,
    buckets: int | Mapping[str, int] = 0,
    scaling: Rule = "standard",
) -> Survey:
    """One pass. The vocabulary is made of training rows only: held-out rows play no part in it.

    Raises RequestError, with column, file, row and value, for what cannot be read or learned from.
    """
    schema = files.schema
    fitting = Fitting(
        schema.categorical,
        schema.numeric,
        text=[name for name, kind in files.kinds.items() if kind == "text"],
        cut_off=cut_off,
        buckets=buckets,
        scaling=scaling,
    )
    parts = np.zeros((len(files.blocks), len(PARTS)), dtype=np.int64)
    ends = np.zeros((len(files.blocks), 2), dtype=np.int64)
    ends[:, 0], ends[:, 1] = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    rows = 0
    for position, piece in files.pieces():
        part, time = placed(piece, schema, split)
        rows += len(part)
        parts[position] += np.bincount(part, minlength=LEFT_OUT + 1)[: len(PARTS)]
        if len(time):
            ends[position, 0] = min(ends[position, 0], time.min())
            ends[position, 1] = max(ends[position, 1], time.max())
        used = kept_rows(part != LEFT_OUT)
        with telling(piece, used):
            column = arrow(piece.batch[schema.label])
            labels(column if used is None else column.filter(used), schema.label)
        if vocabulary is None:
            training = kept_rows(part == 0)
            with telling(piece, training):
                fitting.add(piece.batch, training)
    timed = schema.time is not None
    held = ends[parts.sum(1) > 0]
    return Survey(
        vocabulary if vocabulary is not None else fitting.done(),
        parts,
        rows,
        timed,
        int(ends[:, 0].min()) if rows else 0,
        int(ends[:, 1].max()) if rows else 0,
        timed and len(held) > 1 and bool((held[1:, 0] >= held[:-1, 1]).all()),
    )


def placed(
    piece: Piece, schema: Schema, split: Split
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The part that each row of a piece is in, (n,) uint8, and its time, (n,) int64."""
    with telling(piece, None):
        time = time_of(piece.batch, schema)
        return split.part(
            piece.batch, piece.number, time if schema.time is not None else None
        ), time


def kept_rows(which: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """None for all rows, so that nothing is copied."""
    return None if which.all() else which
