"""A schedule of the learning rate that follows the plan: its end is the end of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from sparing.core.errors import RequestError


@final
class Following:
    """Stands in for a scheduler that was built for ``total`` steps of training on all samples.

    A method that leaves samples out makes fewer steps, and a scheduler that counts them would end
    in the middle of its curve. This one is stepped as often, but each time the scheduler goes to
    the place ``round(total * (epoch + share of the epoch's plan) / epochs)``: exactly one step
    further while nothing is left out, and exactly to ``total`` at the end.

    A ``LambdaLR`` goes there in one jump, forwards or back; any other scheduler makes as many
    steps as it takes, and waits where it is ahead.

    Args:
        scheduler: what the user or the trainer built.
        total: the steps that it was built for.
        progress: ``(numerator, denominator)`` of the share of training that is done.
    """

    def __init__(
        self, scheduler: Any, *, total: int, progress: Callable[[], tuple[int, int]]
    ) -> None:
        if not isinstance(scheduler, LRScheduler):
            raise RequestError(
                f"the schedule of the learning rate is a {type(scheduler).__name__}, which is no "
                "torch LRScheduler: it cannot be led along a plan"
            )
        self.scheduler, self.total, self.progress = scheduler, total, progress

    def place(self) -> int:
        """The scheduler's step that belongs to what is done of training."""
        done, of = self.progress()
        return (2 * self.total * done + of) // (2 * of)

    def step(self, *arguments: Any) -> None:
        """Go to the place of now; ``arguments`` (an epoch, a metric) are not taken into account."""
        place = self.place()
        if isinstance(self.scheduler, LambdaLR):
            if self.scheduler.last_epoch != place:
                self.scheduler.last_epoch = place - 1
                self.scheduler.step()
            return
        while self.scheduler.last_epoch < place:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own."""
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into the scheduler."""
        self.scheduler.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # a half-built copy has none yet
            raise AttributeError(name)
        return getattr(self.scheduler, name)
