"""What hosts share: what users ask of all; of foreign trainers' also counting and the step seam."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparing.core import ranks
from sparing.core.clock import Clock
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Context, Method
from sparing.core.padding import real_tokens
from sparing.hosts import loading
from sparing.hosts.epochs import Epochs
from sparing.hosts.static_flops import StaticFlops

PROBE_BATCHES, PROBE_ROWS = 2, 4


class Bound:
    """Abstract: methods bound to a loop. ``methods``, ``clock`` and ``ledger`` can be read."""

    methods: list[Method]
    clock: Clock
    ledger: Ledger
    """Of this rank; ``account()`` is that of all."""

    def signals(self) -> dict[str, dict[str, Any]]:
        """What each method would have logged now."""
        return {method.name: method.signals() for method in self.methods}

    def account(self) -> Ledger:
        """The account of all ranks together; all ranks must call it."""
        whole = Ledger()
        for part in ranks.gather(self.ledger.to_dict()):
            other = Ledger()
            other.load_state_dict(part)
            whole.merge(other)
        return whole

    def take_events(self) -> list[dict[str, Any]]:
        """What the methods report since the last call, each with its method's name."""
        return [
            {"method": method.name, **event}
            for method in self.methods
            for event in method.take_events()
        ]


class Host(Bound, abc.ABC):
    """Abstract: methods bound to a foreign trainer."""

    def _start(self, methods: list[Method]) -> None:
        self.methods, self.clock, self.ledger = methods, Clock(), Ledger()
        self._counted = [0, 0]  # samples and tokens of this rank since the last step
        self._static = StaticFlops(methods, required=False)
        self._domain_of: Callable[[Tensor], Tensor] | None = None
        self._domains: tuple[str, ...] = ()
        self._recent: deque[Any] = deque(maxlen=PROBE_BATCHES)

    @property
    @abc.abstractmethod
    def _current(self) -> Epochs:
        """The plans of the epochs, and the place in them."""

    @abc.abstractmethod
    def _mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, a scalar, without a trace in training."""

    def _prepared(self, methods: list[Method], batch: Any, context: Context) -> Any:
        """The ``batch`` seam; masks of padding and domains reach methods by the context."""
        if self._domain_of is not None and context.index.shape[1] == 1:
            context.domain = self._domain_of(context.index[:, 0])
            context.extra["domains"] = self._domains
        mask = real_tokens(batch.get("attention_mask") if isinstance(batch, Mapping) else None)
        if mask is not None:
            context.mask = mask
        for method in methods:
            batch = method.batch(batch, context)
        return batch

    def _count(self, model: nn.Module, batch: Any, context: Context) -> None:
        """Enter what a micro-batch spends, before it does."""
        samples, tokens = context.index.shape[0], loading.token_count(batch, context)
        self.ledger.add("samples", spent=samples)
        self.ledger.add("tokens", spent=tokens)
        self.ledger.add("flops", **self._static.of(model, batch, self._mean_loss))
        self._counted[0] += samples
        self._counted[1] += tokens
        self._recent.append(batch)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        """The ``step`` seam, after the optimizer's step."""
        everyone = torch.tensor(self._counted, dtype=torch.int64)
        self._counted = [0, 0]
        ranks.sum_([everyone])
        self.clock.samples += int(everyone[0])
        self.clock.tokens += int(everyone[1])
        self.clock.step += 1
        for method in self.methods:
            method.step(self.clock, optimizer)
            method.account(self.ledger)
        self._current.replan()

    def _state(self, ledger: Ledger) -> dict[str, Any]:
        """What continues the methods bit for bit, with the account that is to be kept."""
        return {
            "methods": {method.name: method.state_dict() for method in self.methods},
            "epochs": self._current.state_dict(),
            "ledger": ledger.state_dict(),
            "recent": list(self._recent),
        }

    def _continue(self, saved: dict[str, Any], device: torch.device | None = None) -> None:
        """Take back what ``_state`` gave, but the ledger; batches go to ``device``.

        Raises RequestError if it is of other methods or other data.
        """
        there, here = sorted(saved["methods"]), sorted(m.name for m in self.methods)
        if there != here:
            raise RequestError(f"the checkpoint is of the methods {there}, attached are {here}")
        self._current.load_state_dict(saved["epochs"])
        for method in self.methods:
            method.load_state_dict(saved["methods"][method.name])
        recent = saved["recent"]
        if device is not None:
            recent = [loading.to_device(batch, device) for batch in recent]
        self._recent = deque(recent, maxlen=PROBE_BATCHES)

    def _probe_of(self, model: nn.Module, known: nn.Module | None = None) -> Tensor:
        """Mean loss over a few rows of the latest batches, the same number on every rank.

        ``known`` is the model as methods know it, where ``model`` stands around that.
        """
        training, found = model.training, []
        model.eval()
        try:
            with ExitStack() as stack, torch.no_grad():
                for method in self.methods:
                    stack.enter_context(method.evaluating(known or model))
                for batch in self._recent:
                    rows = loading.rows(batch)
                    part = loading.first_rows(batch, min(rows, PROBE_ROWS), rows)
                    found.append(self._mean_loss(model, part).float())
        finally:
            model.train(training)
        mean = torch.stack(found).mean()
        ranks.mean_([mean])
        return mean
