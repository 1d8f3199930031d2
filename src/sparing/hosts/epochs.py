"""Where training stands: the clock, the plan of the epoch, and how much of it is done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor

from sparing.core import ranks
from sparing.core.clock import Clock
from sparing.core.errors import RequestError, RunError
from sparing.core.method import Context, Method, Plan
from sparing.hosts import loading


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How samples become steps: ``accumulate`` micro-batches of ``batch_size`` on ``world`` ranks.

    ``limit`` is the most micro-batches of an epoch, or the share of them; ``drop_last`` leaves out
    a smaller last one.
    """

    batch_size: int
    accumulate: int = 1
    world: int = 1
    drop_last: bool = False
    limit: int | float | None = None

    def micro_batches(self, samples: int) -> int:
        """Micro-batches of each rank in an epoch of that many samples."""
        whole = self.batch_size * self.world
        found = (
            samples // whole
            if self.drop_last
            else loading.count(samples, self.batch_size, self.world)
        )
        if isinstance(self.limit, float):
            return int(found * self.limit)
        return found if self.limit is None else min(found, self.limit)

    def steps(self, micro_batches: int) -> int:
        """Optimizer steps of that many micro-batches; a shorter last group is a step too."""
        return -(-micro_batches // self.accumulate)


@final
class Epochs:
    """The plan of each epoch, made once and then frozen, and the position in it.

    Args:
        methods: in the order of their seams.
        size: samples of the data set.
        geometry: of this run; a state saved under another one continues with what remains.
        order: ``order(epoch) -> (n,)`` int64, where no method plans.
        clock: moved by the host's calls here.
        dense: samples of an epoch that leaves none out, ``size`` if not given.
    """

    def __init__(
        self,
        methods: list[Method],
        *,
        size: int,
        geometry: Geometry,
        order: Callable[[int], Tensor],
        clock: Clock,
        dense: int | None = None,
    ) -> None:
        self.methods, self.size, self.geometry, self.clock = methods, size, geometry, clock
        self._dense = size if dense is None else dense
        self._order = order
        self.plan: Plan | None = None
        self.ahead = 0  # micro-batches that loaders are given before they are asked for
        self.start = 0  # samples of the plan that were taken under another geometry
        self.done = 0  # micro-batches of each rank since ``start``

    def plan_of(self, methods: list[Method], clock: Clock) -> Plan:
        """The plan by which the epoch of ``clock`` goes; RequestError if two methods give one."""
        plans = [plan for plan in (m.order(clock) for m in methods) if plan is not None]
        if len(plans) > 1:
            raise RequestError(
                "more than one method plans the order of samples; attach one of them"
            )
        plan = plans[0] if plans else Plan(self._order(clock.epoch))
        if len(plan) and not 0 <= int(plan.index.min()) <= int(plan.index.max()) < self.size:
            raise RequestError(
                f"the plan of epoch {clock.epoch} names samples from {int(plan.index.min())} to "
                f"{int(plan.index.max())}, and the data set has those from 0 to {self.size - 1}"
            )
        return plan

    def begin(self, size: int) -> None:
        """Make the epoch's plan if there is none yet; ``size`` of the data set as it is now.

        Raises RunError if that is not what was told to the methods, if the plan is empty, or if
        the ranks made different ones.
        """
        if size != self.size:
            raise RunError(
                f"the data set had {self.size} samples when the methods were attached, and has "
                f"{size} now: their scores and plans no longer name its samples. Keep the length "
                "fixed, or attach anew to the changed data set"
            )
        if self.plan is None:
            plan = self.plan_of(self.methods, self.clock)
            ranks.agree("the plan of the epoch", plan.index)
            if self.geometry.micro_batches(len(plan)) == 0:
                raise RunError(
                    f"the plan of epoch {self.clock.epoch} has {len(plan)} samples for "
                    f"{self.geometry.world} ranks and batches of {self.geometry.batch_size}: there "
                    "is nothing to train on"
                )
            self.plan, self.start, self.done = plan, 0, 0
            self.clock.dealt = 0
        self.tell()

    def replan(self) -> None:
        """After an optimizer step: at a method's tick, make what is not yet dealt anew.

        Worker processes were given ``ahead`` micro-batches already, workers x prefetch_factor:
        these stay as they were, on every rank and after a resume, and a new plan shows its effect
        right after them. Raises RunError for a plan of another length or another beginning, and
        if the ranks made different ones.
        """
        if self.plan is None or not any(method.replans(self.clock) for method in self.methods):
            return
        old, whole = self.plan, self.geometry.batch_size * self.geometry.world
        dealt = min(len(old), self.start + (self.done + self.ahead) * whole)
        if dealt == len(old):
            return
        self.clock.dealt = dealt
        plan = self.plan_of(self.methods, self.clock)
        ranks.agree("the plan made anew", plan.index)
        if len(plan) != len(old) or not plan.index[:dealt].equal(old.index[:dealt]):
            raise RunError(
                f"the plan made anew at step {self.clock.step} has {len(plan)} samples for the "
                f"{len(old)} of before, or does not begin with the {dealt} that loaders have"
            )
        self.plan = plan

    @property
    def total(self) -> int:
        """Micro-batches of each rank from ``start`` to the end of the plan."""
        return self.geometry.micro_batches(len(self._current) - self.start)

    @property
    def remaining(self) -> int:
        """Micro-batches of each rank that are left in this epoch."""
        return self.total - self.done

    @property
    def finished(self) -> bool:
        """Whether the plan has been trained on."""
        return self.plan is not None and self.remaining <= 0

    def parts(self) -> int:
        """Micro-batches in the accumulation that the next one belongs to."""
        first = self.done - self.done % self.geometry.accumulate
        return min(self.geometry.accumulate, self.total - first)

    def bound(self) -> int:
        """Optimizer steps to the end, if every later epoch took all samples; exact in the last."""
        dense = self.geometry.steps(self.geometry.micro_batches(self._dense))
        left = self.geometry.steps(self.remaining) if self.plan is not None else 0
        later = (self.clock.epochs or 0) - self.clock.epoch - (self.plan is not None)
        return self.clock.step + left + max(0, later) * dense

    def batches(self, data: Any, **loader: Any) -> Iterator[tuple[Any, Context]]:
        """The micro-batches that are left of the plan, on this rank; see ``loading.batches``.

        Each is looked up in the plan when it is its turn, which a tick may have changed.
        """
        start = self.start
        self.ahead = loading.prefetched(data, **loader)

        def rest() -> Plan:
            plan = self._current
            return Plan(plan.index[start:], None if plan.weight is None else plan.weight[start:])

        source = loading.batches(
            data,
            rest,
            batch_size=self.geometry.batch_size,
            start=self.done,
            stop=self.total,
            rank=ranks.rank() if self.geometry.world > 1 else 0,
            world=self.geometry.world,
            **loader,
        )
        yield from source

    def first(self, methods: list[Method], **loader: Any) -> tuple[Any, Context]:
        """The first micro-batch that copies of the methods would plan; nothing here moves."""
        planned = Epochs(
            methods,
            size=self.size,
            geometry=self.geometry,
            order=lambda epoch: torch.arange(self.size),
            clock=self.copy_clock(),
        )
        planned.plan = planned.plan_of(methods, planned.clock)
        return next(planned.batches(**loader))

    def shuffled(self, data: Any, *, by: int, **loader: Any) -> Iterator[Any]:
        """This rank's batches in an order drawn by the seed ``by``, for a look at losses."""
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(by))
        alone = self.geometry.world == 1
        for batch, _ in loading.batches(
            data,
            Plan(order),
            batch_size=self.geometry.batch_size,
            rank=0 if alone else ranks.rank(),
            world=self.geometry.world,
            **loader,
        ):
            yield batch

    def tell(self) -> None:
        """Set the clock's place in the epoch, in optimizer steps."""
        whole = self.geometry.steps(self.geometry.micro_batches(len(self._current)))
        self.clock.length = max(1, whole)
        self.clock.place = max(0, whole - self.geometry.steps(self.remaining))

    def end(self, optimizer: torch.optim.Optimizer | None) -> None:
        """The epoch is over: tell the methods, and let the next plan be made."""
        self.clock.epoch_ended = True
        for method in self.methods:
            method.step(self.clock, optimizer)
        self.clock.epoch_ended = False
        self.clock.epoch += 1
        self.clock.place = self.clock.dealt = 0
        self.plan, self.start, self.done = None, 0, 0

    def state_dict(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "clock": self.clock.state_dict(),
            "size": self.size,
            "geometry": asdict(self.geometry),
            "plan": None if plan is None else {"index": plan.index, "weight": plan.weight},
            "start": self.start,
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Under another geometry the rest of the plan is dealt anew: each remaining sample once.

        Raises RequestError if the state is of a data set of another length.
        """
        if state["size"] != self.size:
            raise RequestError(
                f"the saved state is of a data set with {state['size']} samples, this one has "
                f"{self.size}; resume with the same data, or start afresh"
            )
        epochs, steps = self.clock.epochs, self.clock.steps
        self.clock.load_state_dict(state["clock"])
        self.clock.epochs, self.clock.steps = epochs, steps
        saved = Geometry(**state["geometry"])
        plan = state["plan"]
        self.plan = None if plan is None else Plan(plan["index"], plan["weight"])
        self.start, self.done = state["start"], state["done"]
        if saved != self.geometry and self.plan is not None:
            taken = self.start + self.done * saved.batch_size * saved.world
            self.start, self.done = min(taken, len(self.plan)), 0
        if self.plan is not None:
            self.tell()

    def copy_clock(self) -> Clock:
        """A clock to rehearse with."""
        return copy.copy(self.clock)

    @property
    def _current(self) -> Plan:
        if self.plan is None:
            raise RequestError("no epoch has begun: there is no plan to go by")
        return self.plan
