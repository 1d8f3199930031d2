"""The account: what a run spent, and what dense training would have spent for the same.

A claim of saving is an entry here, not a sentence. Amounts are Python ints, so that sums over a
long run stay exact: a double loses single FLOPs past 9 PFLOP.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex, final

from sparing.core.errors import RequestError, unknown

ADDITIVE: Mapping[str, str] = {
    "samples": "samples trained on",
    "tokens": "tokens trained on",
    "flops": "compute",
    "labels": "labels asked for",
    "row_updates": "table rows updated",
    "bytes": "bytes written or sent",
}
"""Units that add up over a run and over ranks, each with its title."""

LEVELS: Mapping[str, str] = {
    "parameters": "trained parameters",
    "active_parameters": "active parameters per token",
}
"""Units that describe the model: setting one replaces the value before."""

UNITS: Mapping[str, str] = {**ADDITIVE, **LEVELS}

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_SYMBOLS = {"flops": "FLOP", "bytes": "B"}


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One line of the account as people read it; ``saved`` is a fraction of dense."""

    unit: str
    title: str
    spent: str
    dense: str
    saved: float

    def __str__(self) -> str:
        share = "" if self.spent == self.dense else f" ({_percent(self.saved)})"
        return f"{self.title}: {self.spent} of {self.dense}{share}"


@final
class Ledger:
    """What was spent beside what dense training would have spent, by unit.

    The ledger never looks at a tensor by itself. An amount given as a 0-d integer tensor is read
    when it is entered, which waits for the device: enter totals in ``Method.account``, not in
    every step.
    """

    def __init__(self) -> None:
        self._spent: dict[str, int] = {}
        self._dense: dict[str, int] = {}

    def add(
        self, unit: str, *, spent: SupportsIndex | float, dense: SupportsIndex | float | None = None
    ) -> None:
        """Enter a further amount; ``dense`` None means that dense training costs the same.

        ``dense`` may be below ``spent``: some methods cost more than they save, and the
        account says so. Raises RequestError for an unknown unit, for a level, and for an amount
        that is negative, not a number or not whole; nothing is entered then.
        """
        if unit in LEVELS:
            raise RequestError(
                f'"{unit}" describes the model and does not add up; use set_level("{unit}", ...)'
            )
        if unit not in ADDITIVE:
            raise unknown("ledger unit", unit, UNITS)
        cost, plain = _amounts(unit, spent, dense)
        self._spent[unit] = self._spent.get(unit, 0) + cost
        self._dense[unit] = self._dense.get(unit, 0) + plain

    def set_level(
        self, unit: str, *, spent: SupportsIndex | float, dense: SupportsIndex | float | None = None
    ) -> None:
        """Set ``parameters`` or ``active_parameters``; errors as for ``add``."""
        if unit in ADDITIVE:
            raise RequestError(f'"{unit}" adds up over the run; use add("{unit}", ...)')
        if unit not in LEVELS:
            raise unknown("ledger unit", unit, UNITS)
        self._spent[unit], self._dense[unit] = _amounts(unit, spent, dense)

    def spent(self, unit: str) -> int:
        """What was spent; 0 if nothing was entered."""
        return self._read(self._spent, unit)

    def dense(self, unit: str) -> int:
        """What dense training would have spent; 0 if nothing was entered."""
        return self._read(self._dense, unit)

    def saved(self, unit: str) -> float:
        """``1 - spent / dense``: negative if more was spent; 0 if neither spent anything."""
        spent, dense = self.spent(unit), self.dense(unit)
        if dense == 0:
            return 0.0 if spent == 0 else -math.inf
        # the difference first: it is exact, the quotient of two near-equal floats is not
        return (dense - spent) / dense

    def merge(self, other: Ledger) -> None:
        """Take in the account of another rank or run, exactly.

        Amounts add up: over ranks, merge only what each of them entered for its own share. A level
        is a property of the one model that ranks share: the larger stays.
        """
        for unit in other._spent:
            join = operator.add if unit in ADDITIVE else max
            self._spent[unit] = join(self._spent.get(unit, 0), other._spent[unit])
            self._dense[unit] = join(self._dense.get(unit, 0), other._dense[unit])

    def rows(self) -> list[Row]:
        """The units that were entered, in a fixed order, in the words that people read."""
        return [
            Row(
                unit=unit,
                title=title,
                spent=human(self._spent[unit], unit),
                dense=human(self._dense[unit], unit),
                saved=self.saved(unit),
            )
            for unit, title in UNITS.items()
            if unit in self._spent
        ]

    def to_dict(self) -> dict[str, dict[str, int]]:
        """``{unit: {"spent": int, "dense": int}}`` of the units that were entered."""
        return {
            unit: {"spent": self._spent[unit], "dense": self._dense[unit]}
            for unit in UNITS
            if unit in self._spent
        }

    def state_dict(self) -> dict[str, Any]:
        """The account as plain data, the same as ``to_dict``."""
        return dict(self.to_dict())

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Replace the account by one that ``state_dict`` or ``to_dict`` gave.

        Raises RequestError for unknown units and amounts that ``add`` would refuse; the account
        stays as it was then.
        """
        read: dict[str, tuple[int, int]] = {}
        for unit, entry in state.items():
            if unit not in UNITS:
                raise unknown("ledger unit", unit, UNITS)
            if set(entry) != {"spent", "dense"}:
                raise RequestError(
                    f'the ledger entry "{unit}" must have the keys spent and dense, '
                    f"got {sorted(entry)}"
                )
            read[unit] = _amounts(unit, entry["spent"], entry["dense"])
        self._spent = {unit: spent for unit, (spent, _) in read.items()}
        self._dense = {unit: dense for unit, (_, dense) in read.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # an account changes

    def __repr__(self) -> str:
        return f"Ledger({'; '.join(map(str, self.rows()))})"

    @staticmethod
    def _read(amounts: Mapping[str, int], unit: str) -> int:
        if unit not in UNITS:
            raise unknown("ledger unit", unit, UNITS)
        return amounts.get(unit, 0)


def human(amount: int, unit: str) -> str:
    """Three digits with an SI prefix: ``1.23 PFLOP``, ``3.50 M``, ``12.0 kB``, ``999``."""
    symbol = _SYMBOLS.get(unit, "")
    scaled, power = float(amount), 0
    # from 999.5 on three digits would round to 1000: the next prefix begins there
    while scaled >= 999.5 and power < len(_PREFIXES) - 1:
        scaled /= 1000
        power += 1
    digits = f"{scaled:#.3g}".rstrip(".") if power else str(amount)
    return f"{digits} {_PREFIXES[power]}{symbol}".rstrip()


def _percent(saved: float) -> str:
    if not math.isfinite(saved):
        return "dense spends none"
    return f"{saved:.1%} saved" if saved >= 0 else f"{-saved:.1%} more"


def _amounts(
    unit: str, spent: SupportsIndex | float, dense: SupportsIndex | float | None
) -> tuple[int, int]:
    cost = _whole(unit, "spent", spent)
    return cost, cost if dense is None else _whole(unit, "dense", dense)


def _whole(unit: str, side: str, amount: SupportsIndex | float) -> int:
    told = f'the ledger\'s amount of "{unit}" ({side}) must be a whole number, at least 0'
    if isinstance(amount, bool):
        raise RequestError(f"{told}, got {amount}")
    if isinstance(amount, float):
        if not math.isfinite(amount) or amount != int(amount):
            raise RequestError(f"{told}, got {amount!r}")
        exact = int(amount)
    else:
        try:
            exact = operator.index(amount)
        except TypeError:
            raise RequestError(f"{told}, got {amount!r}") from None
    if exact < 0:
        raise RequestError(f"{told}, got {exact}")
    return exact
