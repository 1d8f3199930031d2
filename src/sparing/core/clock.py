"""How far training has come, in optimizer steps, epochs, samples and tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Clock:
    """The time that methods see. Only the host moves it.

    ``step`` counts optimizer steps, never forward passes: gradient accumulation, evaluation and
    activation-checkpoint recomputation do not move it. ``samples`` and ``tokens`` are global
    (summed over ranks). ``steps`` and ``epochs`` are the planned totals, ``None`` if unknown;
    where methods plan epochs of different lengths, ``steps`` is a bound. ``place`` of ``length``
    optimizer steps of this epoch's plan are done (``length`` is 0 where the host does not tell).
    ``dealt``: so many places of this epoch's plan are given to loaders, over all ranks, when
    ``order`` is asked again in mid-epoch: a new plan must begin with them as they were.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    tokens: int = 0
    steps: int | None = None
    epochs: int | None = None
    place: int = 0
    length: int = 0
    dealt: int = 0
    epoch_ended: bool = False
    """True only in the ``step`` seam's call at the end of an epoch."""

    @property
    def fraction(self) -> float:
        """Share of the planned training that is done, in [0, 1]; 0 if the plan is unknown.

        By steps, or by (epoch + share of its plan) / epochs, whichever is further: a method that
        leaves samples out ends the last epoch long before ``steps``.
        """
        by_steps = self.step / self.steps if self.steps else 0.0
        done, of = self.by_epochs or (0, 1)
        return min(1.0, max(by_steps, done / of))

    @property
    def by_epochs(self) -> tuple[int, int] | None:
        """``(epoch + share of its plan) / epochs`` as (numerator, denominator), None if unknown.

        Exactly ``step`` of ``steps`` while all plans have one length.
        """
        if not self.epochs or not self.length:
            return None
        whole = self.epochs * self.length
        return min(whole, self.epoch * self.length + self.place), whole

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
