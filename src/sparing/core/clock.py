"""How far training has come, in optimizer steps, epochs, samples and tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Clock:
    """The time that methods see. Only the host moves it.

    ``step`` counts optimizer steps, never forward passes: gradient accumulation, evaluation and
    activation-checkpoint recomputation do not move it. ``samples`` and ``tokens`` are global
    (summed over ranks). ``steps`` and ``epochs`` are the planned totals, ``None`` if unknown.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    tokens: int = 0
    steps: int | None = None
    epochs: int | None = None
    done: float | None = None
    """(epoch + share of its plan) / epochs, where a method plans epochs of unequal length."""
    epoch_ended: bool = False
    """True only in the ``step`` seam's call at the end of an epoch."""

    @property
    def fraction(self) -> float:
        """Share of the planned training that is done, in [0, 1]; 0 if the plan is unknown."""
        by_steps = min(1.0, self.step / self.steps) if self.steps else 0.0
        return by_steps if self.done is None else max(by_steps, min(1.0, self.done))

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
