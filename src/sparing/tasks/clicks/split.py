"""Which rows are trained on: by time, or by a hash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.tasks.clicks.columns import arrow, integers, kind_of, string_parts, texts
from sparing.tasks.clicks.lookup import mix, text_hashes

PARTS: Final = ("train", "development", "test")
LEFT_OUT: Final = 255


class Split(Protocol):
    """Puts rows into parts. A part that ends up with no row is an error of who reads."""

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        """Whether there should be any row in each of the parts."""
        ...

    def part(self, columns: Any, first: int, time: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        """(n,) uint8, positions in ``PARTS`` or ``LEFT_OUT``.

        ``columns``: n rows by column; ``first``: the number of the first one in the whole log;
        ``time``: (n,) int64.
        """
        ...


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ByTime:
    """Rows before ``development`` are trained on, those from ``test`` on are the test.

    In the unit of the schema's time column; rows before ``start`` or from ``end`` on are left
    out. Nothing of the future is then known in training.

    Raises RequestError for bounds that are not in order.
    """

    development: int
    test: int
    start: int | None = None
    end: int | None = None

    def __post_init__(self) -> None:
        given = [self.start, self.development, self.test, self.end]
        bounds = [bound for bound in given if bound is not None]
        for bound in bounds:
            require_whole("a bound in time", bound, -(2**63))
        if bounds != sorted(bounds):
            raise RequestError(
                "times must be in order: start, development, test, end; got "
                + ", ".join(map(str, bounds))
            )

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        """All parts, a development part only where its time is not empty."""
        return True, self.development < self.test, True

    def part(self, columns: Any, first: int, time: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        """See ``Split.part``. Raises RequestError for a log without a time column."""
        if time is None:
            raise RequestError("a split by time needs a time column: Schema(time=...)")
        found = (time >= self.development).astype(np.uint8) + (time >= self.test)
        if self.start is not None:
            found[time < self.start] = LEFT_OUT
        if self.end is not None:
            found[time >= self.end] = LEFT_OUT
        return found


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ByHash:
    """Shares of the rows, drawn by hash: of the row's number, or of the value in ``column``.

    By a column (a user, a session) all rows with the same value stay together, whatever file they
    are in; by number the same files in the same order give the same split.

    Raises RequestError for shares that leave nothing to train on.
    """

    development: float = 0.1
    test: float = 0.1
    column: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_number("development", self.development, 0, 1)
        require_number("test", self.test, 0, 1)
        require_whole("seed", self.seed, 0)
        if self.development + self.test >= 1:
            raise RequestError(
                f"development {self.development} and test {self.test} leave no rows to train on"
            )

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        """Training rows, and the parts whose share is above 0."""
        return True, self.development > 0, self.test > 0

    def part(self, columns: Any, first: int, time: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        """See ``Split.part``."""
        if self.column is None:
            rows = len(columns)
            hashes = mix(np.arange(first, first + rows, dtype=np.int64), self.seed)
        else:
            hashes = self._hashes(arrow(columns[self.column]))
        # the highest 53 bits are a float64 in [0, 1) without rounding
        place = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
        found = (place < self.test + self.development).astype(np.uint8)
        found[place < self.test] = 2
        return found

    def _hashes(self, column: Any) -> NDArray[np.uint64]:
        assert self.column is not None
        if kind_of(column.type) == "text":
            codes, values = texts(column)
            hashes = text_hashes(*string_parts(values), salt=self.seed)
            # what is missing has the code -1, the last entry
            return np.append(hashes, np.uint64(0))[codes]
        return mix(integers(column, self.column)[0], self.seed)
