"""When a run is to be looked at, and what its loss and speed have been lately."""

from __future__ import annotations

import math
import time
from typing import Any, final

from sparing.core.clock import Clock
from sparing.run.recipe import Watch


@final
class Due:
    """What is to happen at a step: by steps, or, where epochs are planned, by the share done."""

    def __init__(self, watch: Watch, clock: Clock) -> None:
        self.watch, self.clock = watch, clock

    def __call__(self, name: str, before: float) -> bool:
        """Whether the step that led on from the share ``before`` is one of them."""
        clock = self.clock
        share: float = getattr(self.watch, name)
        if clock.by_epochs is None:
            return clock.step % max(1, round(share * (clock.steps or 0))) == 0
        # what rounding lost of a whole number of shares is given back
        return math.floor(clock.fraction / share + 1e-9) > math.floor(before / share + 1e-9)


@final
class Lately:
    """A running loss and speed for the display, and the mean loss since the last log line."""

    def __init__(self) -> None:
        self.loss = math.nan
        self.speed = 0.0
        self._sum, self._count = 0.0, 0
        self._then: tuple[float, int] | None = None

    def add(self, loss: float, tokens: int) -> None:
        """The loss of a micro-batch, and the tokens of the run so far."""
        self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        self._sum, self._count = self._sum + loss, self._count + 1
        now = time.monotonic()
        if self._then is None:
            self._then = (now, tokens)
        elif now - self._then[0] > 1.0:
            self.speed = (tokens - self._then[1]) / (now - self._then[0])
            self._then = (now, tokens)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; its speed is measured anew."""
        return {"loss": self.loss, "sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.loss, self._sum, self._count = state["loss"], state["sum"], state["count"]

    def take(self) -> float:
        """The mean loss since this was last asked."""
        mean = self._sum / max(self._count, 1)
        self._sum, self._count = 0.0, 0
        return mean
