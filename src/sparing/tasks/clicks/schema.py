"""Which column of a log is what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from sparing.core.errors import RequestError

MISSING: Final = ("", "\\N", "null", "NULL", "nan", "NaN")
"""What stands for a missing value in CSV. ``NA`` is not among them: it is a country."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """The columns that are read, by name; all others are left alone.

    ``label``: 0 or 1 in each row. ``categorical``: whole numbers or texts, each a field with a
    vocabulary of its own. ``numeric``: numbers. ``time``: what ``ByTime`` splits by and results
    are grouped by, a whole number (a week, a day, seconds) or a date. ``text``: categorical
    columns that are texts though they look like whole numbers, as codes with leading zeros do;
    of the others the first file decides. ``missing``: what stands for a missing value in CSV.
    ``header``: names of the columns of CSV files that have no line of names.

    Raises RequestError for a column that is named twice and for a log without features.
    """

    label: str
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    time: str | None = None
    text: tuple[str, ...] = ()
    missing: tuple[str, ...] = MISSING
    header: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("categorical", "numeric", "text", "missing", "header"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise RequestError(f'{name} must be a list of names, got "{given}"')
            object.__setattr__(self, name, tuple(given))
        if not self.categorical and not self.numeric:
            raise RequestError("the schema names no columns to learn from: give some categorical")
        used = [self.label, *self.categorical, *self.numeric]
        twice = sorted({name for name in used if used.count(name) > 1})
        if twice:
            raise RequestError(
                f'the column "{twice[0]}" is named twice in the schema: a column is the label, '
                "or categorical, or numeric"
            )
        if self.time == self.label:
            raise RequestError(f'the column "{self.label}" cannot be label and time at once')
        for name in self.text:
            if name not in self.categorical:
                raise RequestError(f'"{name}" is given as text and is not a categorical column')

    @property
    def columns(self) -> tuple[str, ...]:
        """All that are read, each once."""
        time = () if self.time is None else (self.time,)
        return tuple(dict.fromkeys((self.label, *self.categorical, *self.numeric, *time)))
