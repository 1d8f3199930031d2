"""How many optimizer steps a training with plans of unequal length takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

from sparing.core.checks import require_whole


@final
@dataclass(frozen=True, slots=True)
class Steps:
    """Optimizer steps in total; ``expected`` is None until losses are known."""

    least: int
    expected: int | None
    most: int

    @property
    def exact(self) -> bool:
        """Whether the number is certain."""
        return self.least == self.most


class Planned(Protocol):
    """What is asked of a method: ``bounds`` and ``preview`` of later epochs, lengths of past."""

    @property
    def epochs(self) -> int: ...

    def bounds(self, epoch: int) -> tuple[int, int]: ...

    def preview(self, epoch: int) -> int | None: ...

    def lengths(self) -> list[int]: ...


def steps_of(
    samples: int, batch_size: int, *, accumulate: int = 1, world: int = 1, drop_last: bool = False
) -> int:
    """Optimizer steps of an epoch; batches that remain of an accumulation make a step."""
    each = samples // world
    batches = each // batch_size if drop_last else -(-each // batch_size)
    return -(-batches // accumulate)


def total(
    method: Planned, batch_size: int, *, accumulate: int, world: int, drop_last: bool
) -> Steps:
    """Sum over all epochs: those planned already are certain."""
    for name, value in (("batch_size", batch_size), ("accumulate", accumulate), ("world", world)):
        require_whole(name, value, 1)

    def steps(samples: int) -> int:
        return steps_of(
            samples, batch_size, accumulate=accumulate, world=world, drop_last=drop_last
        )

    past = method.lengths()[: method.epochs]
    least = expected = most = sum(steps(length) for length in past)
    known = True
    alike: dict[tuple[int, int], int | None] = {}  # epochs of equal bounds are expected alike
    for epoch in range(len(past), method.epochs):
        low, high = method.bounds(epoch)
        least, most = least + steps(low), most + steps(high)
        if (low, high) not in alike:
            alike[low, high] = method.preview(epoch)
        length = alike[low, high]
        if length is None:
            known = False
        else:
            expected += steps(length)
    return Steps(least, expected if known else None, most)
