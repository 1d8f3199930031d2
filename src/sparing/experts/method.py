"""What all methods that route tokens to experts have in common."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from sparing.core.checks import require_known, require_whole
from sparing.core.clock import Clock
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Batch, Context, Method, Setup, Signal
from sparing.core.padding import owners
from sparing.experts.controller import ExpertController
from sparing.experts.layer import ExpertLayer, expert_layers
from sparing.experts.router import Router


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """Options of every routed method: which blocks become experts, and of what size.

    where: names, globs or layer indices of the feed-forward blocks; None is all of them.
    width: hidden units of each expert; None is the dense block's own width with ``init="copy"``,
    and that width divided by the experts a token takes on average with ``init="fresh"``.
    init: experts start ``fresh`` or each as a ``copy`` of the dense block. zero_output: fresh
    experts start with a last projection of zero, so that a block begins as its residual alone.
    shared: experts that every token takes beside the routed ones, with weight 1, of
    ``shared_width`` hidden units each (default: that of the routed ones); beside copies they start
    with a last projection of zero, so that the block begins as the dense model's.
    residual: keeps the dense block beside the experts. residual_coefficient: each token weighs the
    two by a learned softmax, half and half at first; else both count fully. It is the default
    beside copies, which would double the output otherwise.
    """

    where: Any = None
    width: int | None = None
    init: Literal["fresh", "copy"] = "fresh"
    zero_output: bool = False
    shared: int = 0
    shared_width: int | None = None
    residual: bool = False
    residual_coefficient: bool | None = None

    def __post_init__(self) -> None:
        if self.width is not None:
            require_whole("width", self.width, 1)
        if self.init not in ("fresh", "copy"):
            raise RequestError(f'init must be "fresh" or "copy", got "{self.init}"')
        if self.zero_output and self.init == "copy":
            raise RequestError("zero_output is for fresh experts; a copy keeps the dense block")
        require_whole("shared", self.shared, 0)
        if self.shared_width is not None:
            require_whole("shared_width", self.shared_width, 1)
            if self.shared == 0:
                raise RequestError("shared_width is the size of shared experts; say how many")
        if self.residual_coefficient is None:
            object.__setattr__(self, "residual_coefficient", self.residual and self.init == "copy")
        elif self.residual_coefficient and not self.residual:
            raise RequestError("residual_coefficient needs residual=True")
        if isinstance(self.where, tuple):
            object.__setattr__(self, "where", list(self.where))


Chosen = TypeVar("Chosen")


def nested(name: str, value: Any, kind: type[Chosen]) -> Chosen:
    """An option that is itself a set of options, given as such or as a mapping.

    Raises RequestError for any other value and for keys that ``kind`` does not have.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be a mapping of options, got {value!r}")
    require_known(name, value, kind)
    return kind(**value)


class RoutedExperts(Method, abc.ABC):
    """Abstract: replaces feed-forward blocks by expert layers and looks after them."""

    chooses: ClassVar[bool] = True
    """Whether anything is chosen: what already routes by chance has no random counterpart."""
    loss_stage: ClassVar[Literal["sample", "weight", "batch"]] = "batch"
    conflicts: ClassVar[Mapping[str, str]] = {
        name: "adapters freeze the base, and routers and experts would not be trained"
        for name in ("sparse-adapter", "peft")
    }
    causal: ClassVar[bool] = True
    """Whether a token's routing in training is independent of the other tokens of the batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.layers: list[ExpertLayer] = []
        self.controller: ExpertController | None = None
        self.events: list[dict[str, Any]] = []
        self._seed = 0
        self._parameters = 0
        self._probe: Callable[[], Tensor] | None = None
        self._waiting: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # the probe belongs to a host, which no file can hold
        return {**self.__dict__, "_probe": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedExperts:
        # in memory the copy of a whole loop keeps its probe, and goes on as the original does
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @abc.abstractmethod
    def router(self, dim: int, seed: int = 0) -> Router:
        """A new router for tokens of size ``dim``."""

    @property
    def slots(self) -> int:
        """How many expert slots each layer has."""
        return int(self.options.experts)

    @property
    def expected_k(self) -> float:
        """Experts per token to plan with."""
        return float(self.options.k)

    @classmethod
    def at_random(
        cls, options: Mapping[str, Any], signals: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]] | None:
        """Random routing over as many experts of the same size, as many of them for each token."""
        if not cls.chooses:
            return None
        method = cls(**options)
        k = float(signals.get("mean_k", method.expected_k))
        kept = {f.name: getattr(method.options, f.name) for f in fields(ExpertOptions)}
        return {"random": {"experts": method.slots, "k": min(k, float(method.slots)), **kept}}

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        from sparing.experts.moefy import moefy_

        options = self.options
        if not expert_layers(model):
            moefy_(
                model,
                self,
                where=options.where,
                experts=options.init,
                width=options.width,
                seed=setup.seed,
            )
        self._seed = setup.seed
        self._own(model)
        return model

    def bind(
        self,
        *,
        size: int | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        model: nn.Module | None = None,
        probe: Callable[[], Tensor] | None = None,
    ) -> None:
        self._probe = probe
        self._seed = seed
        if model is not None:
            self._own(model)
        if self.controller is not None and steps is not None:
            self.controller.plan(steps)

    def _own(self, model: nn.Module) -> None:
        layers = expert_layers(model)
        if layers == self.layers:
            return
        self.layers = layers
        self._parameters = sum(p.numel() for p in model.parameters())
        self.controller = ExpertController(
            [(layer.name, layer) for layer in layers],
            getattr(self.options, "adapt", None),
            seed=self._seed,
        )
        if self._waiting is not None:
            self.controller.load_state_dict(self._waiting)
            self._waiting = None

    def batch(self, batch: Batch, context: Context) -> Batch:
        names = context.extra.get("domains")
        domain, owner = context.domain, owners(batch)
        if domain is not None and owner is not None:  # rows hold several samples each
            domain = domain.to(owner.device)[owner.clamp(min=0)]
        for layer in self.layers:
            layer.domain = domain
            layer.domains = len(names) if names else 0
            if layer.domains == 0:
                layer.domain = None
        return batch

    def loss(self, losses: Tensor, context: Context, outputs: Any) -> Tensor:
        found = [value for layer in self.layers for value in layer.take_losses().values()]
        return losses + torch.stack(found).sum() if found else losses

    def step(self, clock: Clock, optimizer: torch.optim.Optimizer | None) -> None:
        if clock.epoch_ended or self.controller is None:
            return
        self.events += self.controller.step(clock.step, optimizer, probe=self._probe)

    def take_events(self) -> list[dict[str, Any]]:
        taken, self.events = self.events, []
        return taken

    def touches(self) -> list[str]:
        lines = []
        for layer in self.layers:
            size = sum(p.numel() for p in layer.parameters())
            alive = int(layer.router.active.sum())
            beside = "" if layer.always is None else f" beside {layer.always.describe()}"
            lines.append(
                f"{layer.name}: feed-forward block becomes {alive} of {self.slots} experts of "
                f"width {layer.experts.width}{beside}, {size:,} parameters"
            )
        return lines

    def estimate(self, tokens: int) -> tuple[int, int]:
        spent = dense = 0
        for layer in self.layers:
            alive = int(layer.router.active.sum())
            rows = round(tokens * min(self.expected_k, alive))
            layer.record.costs.copy_(torch.tensor([rows, tokens * alive, tokens]))
            once = layer.take_flops()
            spent, dense = spent + once[0], dense + once[1]
        return spent, dense

    def export(self, model: nn.Module, path: Path) -> None:
        from sparing.experts.storage import save

        save(model, path)

    @classmethod
    def imported(cls, path: Path, base: Callable[[], nn.Module]) -> nn.Module:
        from sparing.experts.storage import load

        return load(path, base)

    def page(
        self, model: nn.Module, passages: list[dict[str, Any]], read: Callable[[Any], Any]
    ) -> dict[str, Any]:
        controller = self.controller
        if controller is None:
            return {}
        history = controller.history
        shown = {
            column: {name: history.recent(name, column) for name in history.layers}
            for column in ("domain_load", "k_counts")
        }
        return {
            "history": history.to_dict(),
            "load": {name: load for name, load in shown["domain_load"].items() if load},
            "k_counts": {name: counts for name, counts in shown["k_counts"].items() if counts},
            "passages": [{**p, "k": self._experts_per_token(p, read)} for p in passages],
        }

    def _experts_per_token(self, passage: Any, read: Callable[[Any], Any]) -> list[float]:
        """Experts that each token of the passage took, the mean over layers."""
        seen: list[list[Tensor]] = [[] for _ in self.layers]
        handles = [
            layer.router.register_forward_hook(
                lambda _m, _x, routing, into=into: into.append(routing.k)
            )
            for layer, into in zip(self.layers, seen, strict=True)
        ]
        try:
            read(passage)
        finally:
            for handle in handles:
                handle.remove()
        stacked = torch.stack([torch.cat(parts) for parts in seen])  # (layers, tokens)
        mean: list[float] = stacked.float().mean(0).tolist()
        return mean

    def account(self, ledger: Ledger) -> None:
        for layer in self.layers:
            spent, dense = layer.take_flops()
            ledger.add("flops", spent=spent, dense=dense)
        spent, dense = self._active_parameters()
        ledger.set_level("active_parameters", spent=spent, dense=dense)

    def _active_parameters(self) -> tuple[int, int]:
        """Parameters that a token passes on average, and with every live expert."""
        spent = dense = self._parameters
        latest = self.controller.statistics() if self.controller is not None else {}
        for layer in self.layers:
            each = sum(p[0].numel() for p in layer.experts.parameters())
            alive = int(layer.router.active.sum())
            k = latest[layer.name]["mean_k"] if layer.name in latest else self.expected_k
            spent -= round(each * (self.slots - k))
            dense -= each * (self.slots - alive)
        return spent, dense

    def signals(self) -> dict[str, Signal]:
        return self.controller.signals() if self.controller is not None else {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "options": asdict(self.options),
            "controller": self.controller.state_dict() if self.controller else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["controller"] is None:
            return
        if self.controller is None:
            self._waiting = state["controller"]
        else:
            self.controller.load_state_dict(state["controller"])
