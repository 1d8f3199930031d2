"""The adaptive process: which expert slots are in use, decided between optimizer steps.

The published rule is DynMoE's (Guo et al. 2024, arXiv 2405.14297, section 3.2, as released): an
expert without a single token in the window goes, one comes if a single token had none. The
default rule asks instead what an expert is worth: one goes when masking it changes next to
nothing, one comes on trial where tokens are left unserved, and stays if it proves its worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.core.ranks import sum_
from sparing.experts.controller_options import ControllerOptions as ControllerOptions
from sparing.experts.course import (
    Course,
    Verdict,
    load_share,
    published,
    remove_,
    wanted,
)
from sparing.experts.frozen_slots import FrozenSlots
from sparing.experts.newcomer import (
    forget_,
    furnish_,
    place_,
    shared_inputs,
    worst_covered,
)
from sparing.experts.statistics import History, Point, Tally
from sparing.experts.usefulness import loss_change, loss_of, output_changes

if TYPE_CHECKING:
    from sparing.experts.layer import ExpertLayer

Probe = Callable[[], "Tensor | float"]


Event = dict[str, Any]
"""``step`` (optimizer step), ``kind`` ("expert added" or "expert removed"), ``layer`` (its name),
``expert`` (the slot) and ``why``; plain data."""


@final
class ExpertController:
    """Watches the expert layers of a model and decides, between steps, which slots are in use.

    Call ``step`` after every optimizer step, on every rank. It takes the layers' records, sums
    them over ranks in one collective, moves the thresholds and the running means of outputs, and
    at every update adds and removes experts. All decisions follow from the summed numbers, so all
    ranks take the same. Slots that hold no expert are kept from drifting (see FrozenSlots).

    layers: (name, layer) pairs; options: None keeps the number of experts fixed; seed: of the
    noise that newcomers start with; steps: planned optimizer steps, if known.
    """

    def __init__(
        self,
        layers: nn.Module | Sequence[tuple[str, ExpertLayer]],
        options: ControllerOptions | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
    ) -> None:
        if isinstance(layers, nn.Module):
            from sparing.experts.layer import expert_layers

            layers = [(layer.name, layer) for layer in expert_layers(layers)]
        self.layers = dict(layers)
        if len(self.layers) != len(layers):
            raise RequestError("expert layers must have different names")
        self.options = options or ControllerOptions(remove="never", add="never")
        self.steps = steps
        self.updates = 0
        self.probes = 0
        self.history = History(self.names)
        self.frozen = FrozenSlots(list(self.layers.values()))
        self._generator = torch.Generator().manual_seed(seed)
        self._fine = {name: self._tally(name) for name in self.names}
        self._window = {name: self._tally(name) for name in self.names}
        self._latest: dict[str, Point] = {}
        self._courses = {
            name: Course.of(layer.router.active.numel()) for name, layer in self.layers.items()
        }

    @property
    def names(self) -> list[str]:
        """The layers' names, in order."""
        return list(self.layers)

    def _tally(self, name: str) -> Tally:
        router = self.layers[name].router
        return Tally(router.active.numel(), router.dim)

    def plan(self, steps: int | None) -> None:
        """Tell how many optimizer steps are planned, for ``freeze_after``."""
        self.steps = steps

    @torch.no_grad()
    def step(self, step: int, optimizer: Any = None, probe: Probe | None = None) -> list[Event]:
        """After optimizer step number ``step`` (from 1): returns what was added and removed.

        ``optimizer``, wrapped or not, gets the moments of a newcomer's slot cleared. ``probe()``
        returns the mean loss over a few batches, without gradient and in evaluation mode.
        """
        self._sum_records()
        recent = {}
        for name, layer in self.layers.items():
            record = layer.record
            self._steer(layer)
            self._follow_outputs(layer)
            self._fine[name].add(record)
            if self._recording(step):
                self._window[name].add(record)
            recent[name] = record.recent
            record.clear(record.load.device)
        if step % self.options.statistics_every == 0:
            self._note(step)
        return self._update(step, recent, optimizer, probe) if self._due(step) else []

    # ---- every step ---------------------------------------------------------------------------

    def _sum_records(self) -> None:
        sums: list[Tensor] = []
        for layer in self.layers.values():
            record = layer.record
            if layer.domains and record.domain_load is None:
                # a rank without a batch in this step must send what the others send
                slots = record.load.numel()
                record.domain_load = record.load.new_zeros(layer.domains, slots)
            sums += [getattr(record, name) for name in (*Tally.NAMES, "fallback", "output_sum")]
            if record.domain_load is not None:
                sums.append(record.domain_load)
        sum_(sums)

    def _steer(self, layer: ExpertLayer) -> None:
        router, load, tokens = layer.router, layer.record.load, layer.record.tokens
        if self.options.share == "slots":
            # experts alive carry their slots' share, not the share of those that are missing;
            # the fallback's rows say nothing about the gates: counting them would close all
            if router.steers_each:
                tokens = tokens * router.active.sum() / router.active.numel()
            load = load - layer.record.fallback
        router.update_thresholds(load, tokens)

    def _follow_outputs(self, layer: ExpertLayer) -> None:
        means = getattr(layer, "output_mean", None)
        if means is None:
            return
        load = layer.record.load[:, None]
        now = (layer.record.output_sum / load.clamp_min(1)).to(means.dtype)
        known = means.ne(0).any(1, keepdim=True)
        decay = self.options.decay
        moved = torch.where(known, decay * means + (1 - decay) * now, now)
        means.copy_(torch.where(load > 0, moved, means))

    def _note(self, step: int) -> None:
        points = {
            name: self._fine[name].point(layer.router.active) for name, layer in self.layers.items()
        }
        self.history.append(step, points)
        self._latest = points
        self._fine = {name: self._tally(name) for name in self.names}

    # ---- updates ------------------------------------------------------------------------------

    def _since_update(self, step: int) -> int:
        return (step - self.options.warmup) % self.options.every

    def _recording(self, step: int) -> bool:
        window, ago = self.options.window, self._since_update(step)
        return window is None or ago == 0 or ago > self.options.every - window

    def _last(self) -> float:
        return math.inf if self.steps is None else self.options.freeze_after * self.steps

    def _due(self, step: int) -> bool:
        first = max(self.options.warmup, 1)
        return step >= first and self._since_update(step) == 0 and step <= self._last()

    def _update(
        self, step: int, recent: dict[str, Tensor], optimizer: Any, probe: Probe | None
    ) -> list[Event]:
        self.updates += 1
        events: list[Event] = []
        verdicts = self._judge(recent, probe)
        # a newcomer that could not be judged before the end would stay whatever it is worth
        left = (self._last() - step) / self.options.every
        for name, layer in self.layers.items():
            course, window = self._courses[name], self._window[name]
            rule = self.options.resolved(published(layer))
            if int(window.tokens) == 0:
                continue
            found: list[tuple[Literal["expert added", "expert removed"], int, str]] = []
            for expert, why in remove_(layer, rule, course, window, verdicts.get(name)):
                course.left[expert] = self.updates
                found.append(("expert removed", expert, why))
            verdict = verdicts.get(name)
            need = wanted(layer, rule, course, window, verdict, removed=bool(found), left=left)
            if need is not None:
                expert = self._add(layer, rule, course, window, recent[name], optimizer)
                found.append(("expert added", expert, need))
            course.pass_(removed=any(kind == "expert removed" for kind, *_ in found), rule=rule)
            events += [
                {"step": step, "kind": kind, "layer": name, "expert": expert, "why": why}
                for kind, expert, why in found
            ]
        self._window = {name: self._tally(name) for name in self.names}
        return events

    def _judge(self, recent: dict[str, Tensor], probe: Probe | None) -> dict[str, Verdict]:
        """For each layer that may lose an expert by usefulness: its least useful one."""
        names = [
            name
            for name, layer in self.layers.items()
            if self.options.resolved(published(layer))["remove"] == "usefulness"
            and int(layer.router.active.sum()) > self.options.min_experts
            and self._courses[name].trial == 0
        ]
        if not names:
            return {}
        layers = [self.layers[name] for name in names]
        changes = output_changes(layers, [recent[name] for name in names])
        by_loss = probe is not None and self.options.usefulness == "loss"
        base = loss_of(probe) if by_loss and probe is not None else 0.0
        self.probes += int(by_loss)
        verdicts: dict[str, Verdict] = {}
        for name, layer, change in zip(names, layers, changes, strict=True):
            if not by_loss or probe is None:
                limit = self.options.output_tolerance
                verdicts[name] = Verdict("output", change.tolist(), limit)
                continue
            expert = int(change.argmin())
            values = [math.inf] * change.numel()
            values[expert] = loss_change(probe, base, layer.router, expert)
            self.probes += 1
            verdicts[name] = Verdict("loss", values, self.options.loss_tolerance)
        return verdicts

    def _add(
        self,
        layer: ExpertLayer,
        rule: dict[str, Any],
        course: Course,
        window: Tally,
        recent: Tensor,
        optimizer: Any,
    ) -> int:
        router = layer.router
        free = (~router.active).nonzero().squeeze(1).tolist()
        if rule["published"]:
            slot = int(free[0])
        else:  # the slot that has been free for longest, so that one slot does not flap
            slot = int(min(free, key=lambda s: (course.left[s], s)))
        unserved = window.unserved_sum.to(router.similarity)
        if rule["newcomer"] == "kept":
            router.similarity[slot] = torch.nn.functional.normalize(unserved, dim=0)
            threshold = router.slots().get("threshold")
            if threshold is not None:
                threshold[slot] = 0.0
        else:
            inputs = shared_inputs(recent)
            row, incumbent = worst_covered(inputs, router)
            if rule["direction"] == "mean":
                row, incumbent = unserved.float(), int(window.load.argmax())
            place_(router, slot, row, inputs, load_share(layer, rule, window))
            furnish_(layer, slot, incumbent, rule["newcomer"], rule["noise"], self._generator)
        if rule["moments"] == "zero":
            forget_(layer, slot, optimizer)
        router.active[slot] = True
        course.arrive(slot, rule)
        return slot

    # ---- what it knows ------------------------------------------------------------------------

    def signals(self) -> dict[str, Any]:
        """``alive`` (experts of each layer), ``mean_k`` and ``unserved`` (mean over layers)."""
        alive = [int(layer.router.active.sum()) for layer in self.layers.values()]
        found: dict[str, Any] = {"alive": alive, "updates": self.updates}
        if self._latest:
            for name in ("mean_k", "unserved"):
                values = [point[name] for point in self._latest.values()]
                found[name] = sum(values) / len(values)
        return found

    def statistics(self) -> dict[str, Point]:
        """The latest complete point of each layer, with ``domain_load`` (D, E); plain data."""
        return dict(self._latest)

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, and the history; tensors and plain data."""
        return {
            "updates": self.updates,
            "probes": self.probes,
            "steps": self.steps,
            "generator": self._generator.get_state(),
            "history": self.history.to_dict(),
            "latest": self._latest,
            "layers": {
                name: {
                    "fine": self._fine[name].state_dict(),
                    "window": self._window[name].state_dict(),
                    "course": asdict(self._courses[name]),
                }
                for name in self.names
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave. Raises RequestError for other layers."""
        if list(state["layers"]) != self.names:
            raise RequestError(
                f"the saved controller has the layers {list(state['layers'])}, "
                f"this model has {self.names}"
            )
        self.updates, self.probes = state["updates"], state["probes"]
        self.steps = state["steps"] if self.steps is None else self.steps
        self._generator.set_state(state["generator"])
        self.history.load_dict(state["history"])
        self._latest = dict(state["latest"])
        for name, saved in state["layers"].items():
            self._fine[name].load_state_dict(saved["fine"])
            self._window[name].load_state_dict(saved["window"])
            self._courses[name] = Course(**saved["course"])
