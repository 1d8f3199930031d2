"""How many samples of each domain every epoch took, whatever decided which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor


@final
class Taken:
    """Counts samples by epoch and domain; ``sizes``: of the domains in the training set."""

    def __init__(self, domains: Sequence[str], sizes: Tensor) -> None:
        self.domains, self.sizes = tuple(domains), sizes.tolist()
        self._counts: list[Tensor] = []

    def add(self, epoch: int, domain: Tensor | None) -> None:
        """A micro-batch of ``epoch`` whose samples are of these domains, (B,) int64."""
        if domain is None:
            return
        while len(self._counts) <= epoch:
            self._counts.append(torch.zeros(len(self.domains), dtype=torch.int64))
        self._counts[epoch] += torch.bincount(domain.cpu(), minlength=len(self.domains))

    def page(self) -> dict[str, Any]:
        """``sizes`` by domain, and ``epochs``, by domain a list of counts."""
        epochs = [count.tolist() for count in self._counts]
        return {
            "sizes": dict(zip(self.domains, self.sizes, strict=True)),
            "epochs": {name: [row[i] for row in epochs] for i, name in enumerate(self.domains)},
        }

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {"counts": [count.tolist() for count in self._counts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._counts = [torch.tensor(row, dtype=torch.int64) for row in state["counts"]]
