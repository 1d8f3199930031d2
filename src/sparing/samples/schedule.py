"""Schedules of the learning rate that follow the data, not a number of steps fixed in advance.

Epochs of unequal length make the steps in total unknown. These follow (epoch + share of its plan)
/ epochs instead, which ends at 1 whatever was left out.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, final

from torch.optim.lr_scheduler import LRScheduler

from sparing.core.checks import require_number, require_whole


class Progress(Protocol):
    """What is followed: a share of training that is done, in [0, 1]."""

    @property
    def progress(self) -> float: ...


def warm_up(done: float, share: float) -> float:
    """A factor that rises linearly to 1 over the first ``share`` of training."""
    return 1.0 if share <= 0 else min(1.0, done / share)


def cosine(done: float, *, warm: float = 0.0, least: float = 0.0) -> float:
    """A factor: linear warm-up over the share ``warm``, then half a cosine from 1 to ``least``."""
    if done < warm:
        return warm_up(done, warm)
    along = (done - warm) / (1 - warm) if warm < 1 else 1.0
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, along)))


def one_cycle(done: float, *, rise: float = 0.3, start: float = 25.0, end: float = 1e4) -> float:
    """A factor of the highest rate: a cosine up from 1 / start, then down to 1 / (start * end).

    Smith and Topin 2018 (arXiv 1708.07120), with the defaults of torch's ``OneCycleLR``.
    """
    low, last = 1 / start, 1 / (start * end)
    if done < rise:
        return 1 + (low - 1) * 0.5 * (1 + math.cos(math.pi * done / rise))
    along = (done - rise) / (1 - rise) if rise < 1 else 1.0
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, along)))


@final
class Follow:
    """Moves any torch scheduler along with a method's ``progress``; see ``follow``."""

    def __init__(self, scheduler: LRScheduler, method: Progress, total: int) -> None:
        self.scheduler, self.method, self.total = scheduler, method, total

    def step(self) -> None:
        """After each optimizer step: take the scheduler to where training is, forward only."""
        place = min(self.total - 1, math.floor(self.method.progress * self.total + 1e-9))
        while self.scheduler.last_epoch < place:
            self.scheduler.step()

    def get_last_lr(self) -> list[Any]:
        """The rates now, by parameter group."""
        return list(self.scheduler.get_last_lr())

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state."""
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.scheduler.load_state_dict(state)


def follow(scheduler: LRScheduler, method: Progress, total: int) -> Follow:
    """Make a torch scheduler that was built for ``total`` steps follow a method's progress.

    Build it as for full epochs, ``total = epochs * len(loader)``, with OneCycleLR, cosine, warm-up
    or a sequence of them, and call ``step()`` of what comes back after each optimizer step: it
    takes as many of the scheduler's steps as the data that was trained on is worth, and ends at
    the last one, with the rate that the schedule ends with.
    """
    require_whole("total", total, 1)
    require_number("progress", method.progress, 0, 1)
    return Follow(scheduler, method, total)
