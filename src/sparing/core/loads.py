"""How many tokens each expert got: read from any module that says so, whatever library it is of.

A module with a true ``tells_loads`` returns something with ``counts``, (E,), the rows that each of
its E experts gets in that pass; padding is in none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def tells_loads(model: nn.Module) -> bool:
    """Whether any module of the model does."""
    return any(getattr(module, "tells_loads", False) for module in model.modules())


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """A context that adds up the loads of all that passes: one (E,) int64 for each such module.

    In the order of the model's modules, so that the last is the last layer's; empty for a model
    without any. Training's own records are not touched.
    """
    telling = [module for module in model.modules() if getattr(module, "tells_loads", False)]
    found: list[Tensor] = [torch.zeros(0, dtype=torch.int64) for _ in telling]

    def hook_of(place: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            counts = output.counts.detach().to("cpu", torch.int64)
            found[place] = found[place] + counts if found[place].numel() else counts.clone()

        return hook

    handles = [m.register_forward_hook(hook_of(place)) for place, m in enumerate(telling)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
