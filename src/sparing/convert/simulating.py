"""The dense model as if it were converted: no experts are built for it.

A routed sum of parts of a block is its last projection on hidden units that are scaled, each by
the weights of the experts that hold it. This is exact, overlap or not, and takes one product more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparing.convert.fitting import Weigh
from sparing.convert.pieces import Decision
from sparing.convert.split import Split
from sparing.experts.families import Block


def membership(split: Split, units: int) -> tuple[Tensor, Tensor]:
    """How often each routed expert holds each hidden unit, (E, f), and the shared one (f,)."""
    held = torch.zeros(split.index.shape[0], units + 1)
    for row, own in zip(held, split.index, strict=True):
        row.index_add_(0, own % (units + 1), torch.ones(len(own)))
    shared = torch.zeros(units + 1)
    shared.index_add_(0, split.shared % (units + 1), torch.ones(len(split.shared)))
    return held[:, :units], shared[:units]


@contextmanager
def converted(
    blocks: Sequence[Block],
    decisions: Mapping[str, Decision],
    weigh: Weigh,
    scales: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Within, the model of these blocks computes what its converted form would.

    weigh: the router's rule; scales: scalars to use in the place of the decided ones, which may
    need a gradient.
    """
    handles: list[Any] = []
    for block in blocks:
        decision = decisions.get(block.path)
        if decision is not None:
            scale = decision.scale if scales is None else scales[block.path]
            handles += hooks(block, decision, weigh, scale)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooks(block: Block, decision: Decision, weigh: Weigh, scale: float | Tensor) -> list[Any]:
    """What ``converted`` hangs on one block: handles to remove."""
    held, shared = membership(decision.split, block.width)
    gate, down, always = decision.gate, decision.down, decision.always
    assert gate is not None
    weights: list[Tensor] = []
    kept: list[Tensor] = []

    def entering(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        weights[:] = [weigh(x.reshape(-1, x.shape[-1]).float(), gate)]

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = inputs[0]
        if down is not None:
            kept[:] = [hidden.reshape(-1, hidden.shape[-1])]
        factor = scale * (weights[0] @ held) + shared
        return (hidden * factor.view(hidden.shape).to(hidden.dtype),)

    def after(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if down is not None and always is not None:
            filled = torch.nn.functional.pad(kept[0].float(), (0, 1))
            found = filled[:, decision.split.shared] @ always.t()
            for expert, units in enumerate(decision.split.index):
                found += weights[0][:, expert, None] * (filled[:, units] @ down[expert].t())
            own = getattr(block.down, "bias", None)
            y = (found if own is None else found + own).view(y.shape).to(y.dtype)
        if decision.bias is None:
            return y
        return y + (weights[0] @ decision.bias).view(y.shape).to(y.dtype)

    handles = [
        block.body.register_forward_pre_hook(entering),
        block.down.register_forward_pre_hook(before),
    ]
    if decision.bias is not None or down is not None:
        handles.append(block.down.register_forward_hook(after))
    return handles
