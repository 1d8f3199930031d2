"""When an expert goes and when one comes: the rules, for one layer at one update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

import torch

from sparing.experts.statistics import Tally

if TYPE_CHECKING:
    from sparing.experts.layer import ExpertLayer


class Verdict(NamedTuple):
    """What masking each slot's expert changes; infinite where that was not asked."""

    of: Literal["output", "loss"]
    change: list[float]
    limit: float


@final
@dataclass
class Course:
    """What the rule remembers of one layer between updates; all times are updates."""

    weak: list[int]
    """For each slot, the updates in a row that found its expert useless."""
    left: list[int]
    """For each slot, the update at which an expert last left it; 0 for never."""
    trial: int = 0
    """How long the layer is still left alone with its newcomer."""
    watch: int = 0
    """How long the newcomer has yet to prove itself: until then a removal means that it was one
    too many, and no other comes."""
    wait: int = 0
    """How long until the next newcomer may come."""
    backoff: int = 1
    """How long the next removal makes it wait."""

    @staticmethod
    def of(slots: int) -> Course:
        """The beginning, for a layer of so many slots."""
        return Course(weak=[0] * slots, left=[0] * slots)

    def arrive(self, slot: int, rule: dict[str, Any]) -> None:
        """An expert was added."""
        self.weak[slot] = 0
        # this update's own pass_ takes one off again
        self.trial = rule["trial"] + 1
        self.watch = self.trial + rule["patience"]

    def pass_(self, *, removed: bool, rule: dict[str, Any]) -> None:
        """One update is over."""
        self.trial, self.wait = max(0, self.trial - 1), max(0, self.wait - 1)
        if removed:
            self.wait = self.backoff
            self.backoff = min(2 * self.backoff, rule["longest_wait"])
            self.watch = 0
        elif self.watch:
            self.watch -= 1
            if self.watch == 0:
                self.backoff = 1


def published(layer: ExpertLayer) -> bool:
    """Whether the layer's router follows the published rule."""
    return bool(getattr(getattr(layer.router, "options", None), "published", False))


def _target_k(layer: ExpertLayer) -> float | None:
    found: float | None = getattr(getattr(layer.router, "options", None), "target_k", None)
    return found


def load_share(layer: ExpertLayer, rule: dict[str, Any], window: Tally) -> float:
    """The share of the tokens that a newcomer's threshold should let in."""
    active = layer.router.active
    target = _target_k(layer)
    if target is None:
        return float(window.load[active].double().mean() / window.tokens)
    present = active.numel() if rule["share"] == "slots" else int(active.sum()) + 1
    return min(1.0, target / present)


@torch.no_grad()
def remove_(
    layer: ExpertLayer,
    rule: dict[str, Any],
    course: Course,
    window: Tally,
    verdict: Verdict | None,
) -> list[tuple[int, str]]:
    """Switch off the experts that should go: [(expert, why)].

    By ``hits``, all without a token in the window; by ``usefulness``, at most the least useful.
    """
    active = layer.router.active
    alive = active.nonzero().squeeze(1).tolist()
    spare = len(alive) - rule["min_experts"]
    gone: list[tuple[int, str]] = []
    if rule["remove"] == "hits":
        idle = [expert for expert in alive if int(window.load[expert]) == 0]
        # the last slots go first, so that the experts that must stay are the first ones
        for expert in sorted(idle, reverse=True)[: max(0, spare)]:
            gone.append((expert, f"no token in {int(window.tokens)}"))
    elif rule["remove"] == "usefulness" and verdict is not None and spare > 0:
        for expert in alive:
            if verdict.change[expert] < verdict.limit:
                course.weak[expert] += 1
            elif math.isfinite(verdict.change[expert]):
                course.weak[expert] = 0
        useless = [
            expert
            for expert in alive
            if verdict.change[expert] < verdict.limit and course.weak[expert] >= rule["patience"]
        ]
        if useless:
            expert = min(useless, key=lambda e: (verdict.change[e], e))
            change = verdict.change[expert]
            gone.append(
                (expert, f"masking it changes the {verdict.of} by {change:+.4f} < {verdict.limit}")
            )
    for expert, _ in gone:
        active[expert] = False
        course.weak[expert] = 0
    return gone


def wanted(
    layer: ExpertLayer,
    rule: dict[str, Any],
    course: Course,
    window: Tally,
    verdict: Verdict | None,
    *,
    removed: bool,
    left: float,
) -> str | None:
    """Why the layer should get another expert now, or None; ``left``: updates still to come."""
    active, tokens = layer.router.active, int(window.tokens)
    if bool(active.all()):
        return None
    unserved = int(window.unserved)
    if rule["add"] == "any":
        return f"{unserved} of {tokens} tokens unserved" if unserved else None
    if rule["add"] != "unserved" or removed or course.watch or course.wait:
        return None
    if left < rule["trial"] + rule["patience"]:
        return None
    if any(course.weak[expert] for expert in active.nonzero().squeeze(1).tolist()):
        return None
    if (
        verdict is not None
        and verdict.of == "loss"
        and min(verdict.change) < rule["hysteresis"] * verdict.limit
    ):
        return None  # the last one is hardly worth its place: the next would be worth less
    k = _target_k(layer)
    if k is None:
        k = max(1.0, int(window.load.sum()) / tokens)
    level = math.exp(-k)
    if unserved / tokens > level + rule["margin"]:
        return f"unserved {unserved / tokens:.3f} > e^-k {level:.3f} + {rule['margin']:g}"
    return None
