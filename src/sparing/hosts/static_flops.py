"""FLOPs of a micro-batch that follow from its shape, each shape counted once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from torch import Tensor, nn

from sparing.core import flops
from sparing.core.errors import RequestError
from sparing.core.method import Method
from sparing.hosts import loading


@final
class StaticFlops:
    """FLOPs of the parts of a model that no method accounts for."""

    def __init__(self, methods: Sequence[Method], *, required: bool = True) -> None:
        """Without ``required`` a loss that calls no layer that counts is taken to cost nothing."""
        self._methods, self._required = methods, required
        self._known: dict[Any, dict[str, int]] = {}

    def of(
        self, model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]
    ) -> dict[str, int]:
        """``spent``, and ``dense`` where a method trains beside a frozen model.

        ``loss`` gives a scalar of model and batch. Raises RequestError if a count is required and
        it calls no layer that could be counted.
        """
        key = loading.shapes(batch)
        if key not in self._known:
            worlds = {"spent": False}
            if any(method.freezes for method in self._methods):
                worlds["dense"] = True
            try:
                self._known[key] = {
                    name: flops.count(model, lambda: loss(model, batch), dense=dense).total
                    for name, dense in worlds.items()
                }
            except RequestError:
                if self._required:
                    raise
                self._known[key] = {"spent": 0}
        return self._known[key]
