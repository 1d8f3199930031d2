"""What a LightningModule's ``training_step`` computes of a batch, without a trace in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.hosts import lightning_requests

# where ``loss`` puts what it is given while a training_step is only tried: copies of a module may
# hold this callback or a copy of it
TRIED: ContextVar[list[tuple[Tensor, Any]] | None] = ContextVar("TRIED", default=None)


def tried_by(module: Any, batch: Any) -> tuple[Tensor, Any]:
    """What a ``training_step`` gives to ``loss``, without logging."""
    tried: list[tuple[Tensor, Any]] = []
    token = TRIED.set(tried)
    try:
        with _quiet(module):
            module.training_step(batch, 0)
    finally:
        TRIED.reset(token)
    if len(tried) != 1:
        raise RequestError(
            f"training_step called methods.loss {len(tried)} times for one batch; it must return "
            "methods.loss(losses, outputs), once, of one loss for each sample"
        )
    return tried[0]


def loss_of(module: Any, model: nn.Module, batch: Any) -> Tensor:
    """The mean loss of a batch by ``training_step``, with ``model`` where methods know theirs."""
    standing = lightning_requests.model_of(module)
    if standing is module:
        return tried_by(model, batch)[0].mean()
    lightning_requests.replace_model_(module, model)
    try:
        return tried_by(module, batch)[0].mean()
    finally:
        lightning_requests.replace_model_(module, standing)


@contextmanager
def _quiet(module: Any) -> Iterator[None]:
    module.log = module.log_dict = lambda *given, **named: None
    try:
        yield
    finally:
        del module.log, module.log_dict
