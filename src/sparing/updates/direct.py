"""CowClip in a plain loop, by the optimizer's own hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparing.core import ranks
from sparing.core.clock import Clock
from sparing.core.errors import RequestError
from sparing.core.method import Setup
from sparing.core.sparse_gradients import check_optimizer, clip_norm_
from sparing.updates.rowwise import RowWise

if TYPE_CHECKING:
    from sparing.updates.cowclip import CowClip


def install(
    method: CowClip,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float | None,
    others: bool,
) -> None:
    """Bind the method to a model and an optimizer; see ``CowClip.direct``."""
    if method.options.group:
        raise RequestError(
            f"{', '.join(sorted(method.options.group))} belong to the optimizer, which is built "
            "already; give its groups those values"
        )
    inner = getattr(optimizer, "optimizer", optimizer)
    model = getattr(model, "module", model)
    if method.options.reduce == "rows" and ranks.distributed():
        raise RequestError(
            'reduce="rows" takes tables out of DDP before it is built; use it in a host, or call '
            "method.prepare(model, setup) before DDP and method.grads after backward yourself"
        )
    method.prepare(model, Setup())
    method.bind(model=model)
    check_optimizer(model, inner)
    trained = {id(p) for group in inner.param_groups for p in group["params"]}
    strangers = [table.name for table in method.tables if id(table.weight) not in trained]
    if strangers:
        raise RequestError(
            f"the optimizer does not have the weights of {', '.join(strangers)}; give it "
            "model.parameters() of this very model, or leave the tables out by tables=[...]"
        )
    if isinstance(inner, RowWise):
        inner.follow_(model)  # tables that the clip leaves out may lag too
    method.follow(inner)
    clock = Clock()
    handles: list[Any] = []
    for table in method.tables:
        assert table.lookups is not None
        hook = table.lookups.landed
        handles.append(table.weight.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def before(*_: Any) -> None:
        if getattr(inner, "grad_scale", None) is not None:  # of optimizers that unscale in a step
            raise RequestError(
                f"the gradients are still scaled, and {type(inner).__name__} would unscale them "
                "after CowClip: call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        if not others and not ranks.distributed():
            _check_untouched(method)
        method.grads(model.named_parameters(), None)
        if clip is not None:
            parameters = [p for group in inner.param_groups for p in group["params"]]
            clip_norm_(parameters, clip)

    def after(*_: Any) -> None:
        clock.step += 1
        method.step(clock, inner)

    handles.append(inner.register_step_pre_hook(before))
    handles.append(inner.register_step_post_hook(after))

    method._handles = handles


def _check_untouched(method: CowClip) -> None:
    """Whoever changes a gradient between backward and here most likely clips it.

    A GradScaler's unscaling leaves no trace, as it should.
    """
    for table in method.tables:
        grad, lookups = table.weight.grad, table.lookups
        assert lookups is not None
        if grad is None or lookups.version is None or grad.is_sparse:
            continue
        if grad._version != lookups.version:
            raise RequestError(
                f"the gradient of table {table.name} was changed between backward and "
                "optimizer.step(): a global clip before CowClip sees rows that CowClip has yet to "
                "clip. Remove clip_grad_norm_ and give direct(..., clip=max_norm), which comes "
                "after; others=True if it has to be so"
            )
