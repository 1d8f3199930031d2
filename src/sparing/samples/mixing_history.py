"""What a mixture's page shows over time: weights, losses and what the weights followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor


@final
class MixHistory:
    """One row a tick, as lists that JSON takes; a loss that is not known yet is None."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Any]] = {"steps": [], "weights": [], "losses": [], "signal": []}

    def note(self, step: int, weights: Tensor, losses: Tensor, signal: Tensor | None) -> None:
        """weights, losses, signal: (D,) each, as they are from ``step`` on."""
        latest = losses.tolist()
        self._rows["steps"].append(step)
        self._rows["weights"].append(weights.tolist())
        self._rows["losses"].append([None if loss != loss else loss for loss in latest])
        self._rows["signal"].append(None if signal is None else signal.tolist())

    def state_dict(self) -> dict[str, list[Any]]:
        """The rows, by column."""
        return {key: list(values) for key, values in self._rows.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[Any]]) -> None:
        """Put back what ``state_dict`` gave."""
        self._rows = {key: list(values) for key, values in state.items()}
