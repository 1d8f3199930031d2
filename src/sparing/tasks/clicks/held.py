"""Where encoded rows are held: in memory, in shards on the disk, or nowhere, decoded as needed."""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from sparing.tasks.clicks.encoded import Encoded, encode, joined
from sparing.tasks.clicks.files import LogFiles
from sparing.tasks.clicks.lookup import mix
from sparing.tasks.clicks.split import PARTS, Split
from sparing.tasks.clicks.survey import Survey, kept_rows, placed
from sparing.tasks.clicks.vocabulary import Vocabulary


@final
class Streamed:
    """The training rows of Parquet files, whose row groups are decoded when they are asked for.

    ``counts``, (K,): training rows of each row group. Errors as for ``read``.
    """

    def __init__(
        self,
        files: LogFiles,
        split: Split,
        vocabulary: Vocabulary,
        counts: NDArray[np.int64],
    ) -> None:
        self._files, self._split, self._vocabulary = files, split, vocabulary
        self._counts = counts

    def __len__(self) -> int:
        return int(self._counts.sum())

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Training rows of each row group, (K,) int64."""
        return self._counts

    def block(self, number: int) -> Encoded:
        """The training rows of one row group."""
        schema = self._files.schema
        found = []
        for piece in self._files.block(self._files.blocks[number]):
            kept = placed(piece, schema, self._split)[0] == 0
            found.append((encode(piece, schema, self._vocabulary, kept_rows(kept)), slice(None)))
        return joined(found)


def in_memory(
    files: LogFiles, split: Split, seen: Survey, block: int, *, train: bool
) -> list[Encoded | None]:
    """The parts that have rows, in memory; the training part only if asked for."""
    room = _room(seen, None)
    if not train:
        room[0] = None
    if any(part is not None for part in room):
        _fill(files, split, seen, room, None)
    return [None if part is None else cut(part, block) for part in room]


def on_disk(files: LogFiles, split: Split, seen: Survey, folder: Path, block: int) -> None:
    """The parts that have rows, in folders of ``folder``; training rows in random shards.

    Which shard a row goes to is a hash of its number, so that each shard is a random sample and
    the rows of one are read together. The shards lie one after the other in the same files.
    """
    for name in PARTS:
        (folder / name).mkdir()
    room = _room(seen, folder)
    count = int(seen.parts[:, 0].sum())
    shards = Shards(count, -(-count // block))
    _fill(files, split, seen, room, shards)
    for name, part in zip(PARTS, room, strict=True):
        if part is None:
            (folder / name).rmdir()
            continue
        part.flush()
        bounds = shards.bounds if name == "train" else cut(part, block).bounds
        np.save(folder / name / "bounds.npy", bounds)


@final
class Shards:
    """Places for rows that come in order: each in its shard, behind those that came before."""

    def __init__(self, rows: int, shards: int) -> None:
        self._shards = shards
        sizes = np.zeros(shards, dtype=np.int64)
        step = 1 << 20
        for start in range(0, rows, step):
            number = np.arange(start, min(start + step, rows), dtype=np.int64)
            sizes += np.bincount(self._of(number), minlength=shards)
        self.bounds = np.concatenate([[0], np.cumsum(sizes)])
        self._next = self.bounds[:-1].copy()
        self._taken = 0

    def places(self, rows: int) -> NDArray[np.int64]:
        """(rows,) int64, for the next ones."""
        shard = self._of(np.arange(self._taken, self._taken + rows, dtype=np.int64))
        order = np.argsort(shard, kind="stable")
        sizes = np.bincount(shard, minlength=self._shards)
        before = np.cumsum(sizes) - sizes
        found = np.empty(rows, dtype=np.int64)
        found[order] = np.arange(rows) + np.repeat(self._next - before, sizes)
        self._next += sizes
        self._taken += rows
        return found

    def _of(self, number: NDArray[np.int64]) -> NDArray[np.int64]:
        return (mix(number, salt=1) % np.uint64(self._shards)).view(np.int64)


def _room(seen: Survey, folder: Path | None) -> list[Encoded | None]:
    fields, numbers = len(seen.vocabulary.fields), len(seen.vocabulary.scales)
    return [
        Encoded.empty(int(count), fields, numbers, None if folder is None else folder / name)
        if count
        else None
        for name, count in zip(PARTS, seen.parts.sum(0), strict=True)
    ]


def _fill(
    files: LogFiles,
    split: Split,
    seen: Survey,
    room: list[Encoded | None],
    shards: Shards | None,
) -> None:
    """The second pass: encode each row and put it where it belongs."""
    filled = [0] * len(PARTS)
    for _, piece in files.pieces():
        part = placed(piece, files.schema, split)[0]
        for number, target in enumerate(room):
            which = part == number
            if target is None or not which.any():
                continue
            rows = encode(piece, files.schema, seen.vocabulary, kept_rows(which))
            begin, filled[number] = filled[number], filled[number] + len(rows)
            if shards is not None and number == 0:
                target.put_(shards.places(len(rows)), rows)
            else:
                target.put_(slice(begin, filled[number]), rows)


def cut(part: Encoded, block: int) -> Encoded:
    """The same rows, in blocks of ``block``."""
    bounds = np.append(np.arange(0, len(part), block), len(part))
    return Encoded(part.ids, part.numeric, part.labels, part.time, bounds)
