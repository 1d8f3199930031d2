"""Conversion as a method: a trained dense model becomes experts, and is trained on as such."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from sparing.convert.in_memory import convert_, cut_
from sparing.convert.looking import Looked, batches_of
from sparing.convert.method_options import CUT, NONE, OTHER, ConvertOptions
from sparing.convert.reading import written
from sparing.core import registry
from sparing.core.clock import Clock
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Batch, Context, Method, Setup, Signal
from sparing.experts import storage
from sparing.experts.layer import expert_layers
from sparing.experts.method import RoutedExperts

_ROUTERS = ("dynmoe", "top-k", "noisy-top-k", "switch", "sigmoid-top-k", "expert-choice",
            "random", "hash", "top-p", "relu")  # fmt: skip


@final
class Convert(Method):
    """Makes experts of a trained model's feed-forward blocks before training, and routes.

    In memory, by the code of ``sparing convert``. A model that has experts already, of an earlier
    conversion, keeps them. See ConvertOptions; LLaMA-MoE, arXiv 2406.16554.
    """

    name: ClassVar[str] = "convert"
    Options = ConvertOptions
    loss_stage: ClassVar[Literal["sample", "weight", "batch"]] = "batch"
    conflicts: ClassVar[Mapping[str, str]] = {
        **RoutedExperts.conflicts,
        **{name: "both make experts; name the router in convert's options" for name in _ROUTERS},
    }
    identity: ClassVar[Mapping[str, Any]] = {"method": NONE}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.experts: RoutedExperts | None = None
        self._told: list[str] = []
        self._cut: tuple[int, int] | None = None  # parameters after and before, without experts
        self._waiting: dict[str, Any] | None = None

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        options = self.options
        if options.method == NONE:
            return model
        if expert_layers(model):
            self._adopt(model)
        else:
            self._make(model, setup)
        if self.experts is not None:
            self.experts.prepare(model, setup)
            if self._waiting is not None:
                self.experts.load_state_dict(self._waiting)
                self._waiting = None
        return model

    def _adopt(self, model: nn.Module) -> None:
        """The method that an earlier conversion noted on the model."""
        surgeries = vars(model).get("sparing", {}).get("surgeries", [])
        if not surgeries or self.options.method == CUT:
            raise RequestError(
                "this model has experts already, which are not of a conversion; start from a "
                "dense model, or leave the method convert out"
            )
        found = registry.method(surgeries[0]["method"]).from_dict(surgeries[0]["options"])
        assert isinstance(found, RoutedExperts)
        self.experts, self._told = found, ["the model has experts already, and keeps them"]

    def _make(self, model: nn.Module, setup: Setup) -> None:
        options = self.options
        wanted = options.conversion(setup.seed)
        device = next(model.parameters()).device
        model.to("cpu")
        looked: nn.Module = model
        batches: list[Any] = []
        if options.reads and options.text == "own":
            batches = written(model, wanted.sequences, wanted.length, wanted.seed)
        elif options.reads:
            batches, looked = batches_of(setup, wanted.sequences), Looked(model, setup)
        if options.method == CUT:
            before = _count(model)
            share = wanted.active / wanted.experts
            kept = cut_(model, share, batches, looked, refit=options.refit)
            self._cut = (_count(model), before)
            self._told = [f"{path}: cut to {count} hidden units" for path, count in kept.items()]
        else:
            self.experts, decisions = convert_(model, wanted, batches, looked)
            self._told = [f"{path}: scale {d.scale:.3f}" for path, d in decisions.items()]
        model.to(device)

    # ---- the rest is that of the experts -----------------------------------------------------

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
        if self.experts is not None:
            self.experts.bind(
                size=size, epochs=epochs, steps=steps, seed=seed, model=model, probe=probe
            )

    def batch(self, batch: Batch, context: Context) -> Batch:
        return batch if self.experts is None else self.experts.batch(batch, context)

    def loss(self, losses: Tensor, context: Context, outputs: Any) -> Tensor:
        return losses if self.experts is None else self.experts.loss(losses, context, outputs)

    def step(self, clock: Clock, optimizer: torch.optim.Optimizer | None) -> None:
        if self.experts is not None:
            self.experts.step(clock, optimizer)

    def take_events(self) -> list[dict[str, Any]]:
        return [] if self.experts is None else self.experts.take_events()

    def touches(self) -> list[str]:
        if self.options.method == NONE:
            return [OTHER[NONE]]
        return [*self._told, *([] if self.experts is None else self.experts.touches())]

    def estimate(self, tokens: int) -> tuple[int, int]:
        return (0, 0) if self.experts is None else self.experts.estimate(tokens)

    def account(self, ledger: Ledger) -> None:
        if self.experts is not None:
            self.experts.account(ledger)
        elif self._cut is not None:
            ledger.set_level("active_parameters", spent=self._cut[0], dense=self._cut[1])

    def signals(self) -> dict[str, Signal]:
        return {} if self.experts is None else self.experts.signals()

    def page(
        self, model: nn.Module, passages: list[dict[str, Any]], read: Callable[[Any], Any]
    ) -> dict[str, Any]:
        return {} if self.experts is None else self.experts.page(model, passages, read)

    def export(self, model: nn.Module, path: Path) -> None:
        """For ``sparing.load``; a model without experts is left to the task."""
        if self.experts is not None:
            self.experts.export(model, path)

    @classmethod
    def imported(cls, path: Path, base: Callable[[], nn.Module]) -> nn.Module:
        """What ``export`` wrote, or the dense model that a task wrote where there are no experts.

        Raises RequestError for a directory without a model.
        """
        if (path / storage.NOTE).is_file():
            return storage.load(path, base)
        return _dense(path)

    def state_dict(self) -> dict[str, Any]:
        kept = self._waiting
        return {"experts": kept if self.experts is None else self.experts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.experts is None:
            self._waiting = state["experts"]
        elif state["experts"] is not None:
            self.experts.load_state_dict(state["experts"])


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _dense(path: Path) -> nn.Module:
    import transformers

    try:
        named = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        found: nn.Module = getattr(transformers, named).from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RequestError(f"there is no model in {path} to read again: {error}") from error
    return found.eval()
