"""What the samples that an epoch leaves out would have cost, entered into the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from sparing.core.ledger import Ledger


@final
class LeftOut:
    """Counts the samples that came, and enters for those that did not as much as these cost."""

    def __init__(self) -> None:
        self._since = 0
        self._counted: dict[str, int] = {}
        self._carry: dict[str, int] = {}

    def count(self, rows: int) -> None:
        """So many samples were trained on."""
        self._since += rows

    def account(self, ledger: Ledger, *, held: int, whole: int) -> None:
        """Enter what is due for a plan that holds ``held`` of ``whole`` samples.

        Exact in integers: what a division leaves over is carried to the next call.
        """
        amounts = {"samples": self._since}
        self._since = 0
        for unit in ("tokens", "flops"):
            now = ledger.dense(unit)
            amounts[unit] = max(0, now - self._counted.get(unit, 0))
        for unit, amount in amounts.items():
            if unit != "samples" and not amount:
                continue
            missing = self._carry.get(unit, 0) + amount * (whole - held)
            extra, self._carry[unit] = divmod(missing, held)
            ledger.add(unit, spent=0, dense=max(0, extra))
            self._counted[unit] = ledger.dense(unit)

    def state_dict(self) -> dict[str, Any]:
        return {
            "since": self._since,
            "counted": dict(self._counted),
            "carry": dict(self._carry),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._since = state["since"]
        self._counted, self._carry = dict(state["counted"]), dict(state["carry"])
