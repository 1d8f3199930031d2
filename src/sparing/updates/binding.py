"""How often the clip binds, over time and by how often an id came."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from sparing.updates.clip import norms

BINS = 24
"""Of frequencies: 1, 2-3, 4-7, ...; the last holds all that come more often."""


@final
class Binding:
    """Counts of rows that occurred and of rows that were clipped."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.steps = 0
        self.last = [0, 0]  # rows that occurred and rows clipped, of the latest step
        self.total = [0, 0]
        self.by_frequency = torch.zeros(2, BINS, dtype=torch.int64)
        self.frequency: dict[str, Tensor] = {}

    def begin(self) -> None:
        """A step begins."""
        self.steps += 1
        self.last = [0, 0]

    def note(self, name: str, rows: int, ids: Tensor | None, counts: Tensor, over: Tensor) -> None:
        """ids: (n,) or None for all rows; counts, over: (n,)."""
        present = counts > 0
        pair = [int(present.sum()), int(over.sum())]
        self.last = [a + b for a, b in zip(self.last, pair, strict=True)]
        self.total = [a + b for a, b in zip(self.total, pair, strict=True)]
        if not self.every:
            return
        held = self.frequency.get(name)
        if held is None:
            held = self.frequency[name] = torch.zeros(rows, dtype=torch.int64)
        if held.device != counts.device:
            held = self.frequency[name] = held.to(counts.device)
        if ids is None:
            held += counts
        else:
            held.index_add_(0, ids, counts)
        if (self.steps - 1) % self.every:
            return
        came = held if ids is None else held[ids]
        for kind, mask in enumerate((present, over)):
            self.by_frequency[kind] += _bins(came[mask]).bincount(minlength=BINS).cpu()

    def signals(self) -> dict[str, Any]:
        """Shares of the rows that occurred."""
        present, over = self.by_frequency
        return {
            "clipped": self.last[1] / max(self.last[0], 1),
            "clipped_so_far": self.total[1] / max(self.total[0], 1),
            "rows": self.last[0],
            "clipped_by_frequency": (over / present.clamp_min(1)).tolist() if self.every else [],
        }

    def of_table(self, name: str, weight: Tensor) -> dict[str, list[float]]:
        """By frequency: how many rows there are, and their mean norm. Of ids that came."""
        held = self.frequency.get(name)
        if held is None:
            return {"rows": [], "norms": []}
        came = held > 0
        bins = _bins(held[came])
        rows = bins.bincount(minlength=BINS)
        summed = torch.bincount(bins, norms(weight.detach())[came].double(), minlength=BINS)
        return {"rows": rows.tolist(), "norms": (summed / rows.clamp_min(1)).tolist()}

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors."""
        return {
            "steps": self.steps,
            "last": list(self.last),
            "total": list(self.total),
            "by_frequency": self.by_frequency.clone(),
            "frequency": {name: held.clone() for name, held in self.frequency.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.steps, self.last, self.total = state["steps"], [*state["last"]], [*state["total"]]
        self.by_frequency = state["by_frequency"].clone()
        self.frequency = {name: held.clone() for name, held in state["frequency"].items()}


def _bins(frequency: Tensor) -> Tensor:
    """floor(log2) of numbers from 1, (n,) int64; in float64, which has all that occur exactly."""
    return (torch.frexp(frequency.double()).exponent.long() - 1).clamp_max(BINS - 1)
