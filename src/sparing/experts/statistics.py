"""What experts did: load, experts per token, unserved tokens, by layer, over time, by domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sparing.experts.layer import ExpertLayer

Point = dict[str, Any]


@final
class Tally:
    """Sums of one layer's records over some optimizer steps.

    tokens, unserved: (); load: (E,); k_counts: (E + 1,); unserved_sum: (d,), float64;
    domain_load: (D, E) or None. All whole numbers are int64.
    """

    NAMES = ("tokens", "unserved", "load", "k_counts", "unserved_sum")

    def __init__(self, slots: int, dim: int) -> None:
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.unserved = torch.zeros((), dtype=torch.int64)
        self.load = torch.zeros(slots, dtype=torch.int64)
        self.k_counts = torch.zeros(slots + 1, dtype=torch.int64)
        self.unserved_sum = torch.zeros(dim, dtype=torch.float64)
        self.domain_load: Tensor | None = None

    def add(self, other: Any) -> None:
        """Add a Record or another Tally."""
        if self.load.device != other.load.device:
            for name in self.NAMES:
                setattr(self, name, getattr(self, name).to(other.load.device))
        for name in self.NAMES:
            getattr(self, name).add_(getattr(other, name))
        if other.domain_load is not None:
            known = self.domain_load
            if known is None or known.shape != other.domain_load.shape:
                self.domain_load = other.domain_load.clone()
            else:
                known.add_(other.domain_load)

    def point(self, active: Tensor) -> Point:
        """The sums as plain numbers; mean_k is NaN-free: 0 without tokens."""
        tokens, rows = int(self.tokens), int(self.load.sum())
        return {
            "tokens": tokens,
            "alive": int(active.sum()),
            "active": active.tolist(),
            "mean_k": rows / tokens if tokens else 0.0,
            "unserved": int(self.unserved) / tokens if tokens else 0.0,
            "load": self.load.tolist(),
            "k_counts": self.k_counts.tolist(),
            "domain_load": None if self.domain_load is None else self.domain_load.tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {name: getattr(self, name) for name in (*self.NAMES, "domain_load")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        for name in (*self.NAMES, "domain_load"):
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)


@final
class History:
    """Points over time, by layer: lists of equal length that JSON takes as they are.

    ``steps``: the optimizer step at the end of each point's window. Per layer: ``alive``, experts;
    ``mean_k``, rows per token; ``unserved``, share of tokens that no gate opened for, before any
    fallback; ``tokens``; ``load``, rows of each slot; ``k_counts``, tokens by number of experts;
    ``domain_load``, rows by domain and slot, None where domains are unknown.
    """

    COLUMNS = ("alive", "mean_k", "unserved", "tokens", "load", "k_counts", "domain_load")

    def __init__(self, names: Sequence[str]) -> None:
        self.layers: dict[str, dict[str, list[Any]]] = {
            name: {column: [] for column in ("steps", *self.COLUMNS)} for name in names
        }

    def append(self, step: int, points: dict[str, Point]) -> None:
        """Add one point for every layer."""
        for name, columns in self.layers.items():
            columns["steps"].append(step)
            for column in self.COLUMNS:
                columns[column].append(points[name][column])

    def recent(self, layer: str, column: str, share: float = 0.1) -> Any:
        """The sum of ``column`` over the last ``share`` of the points, at least one; None if none.

        column: ``load`` or ``k_counts`` (lists), or ``domain_load`` (a list of lists).
        """
        points = self.layers[layer][column]
        last = points[-max(1, round(share * len(points))) :]
        if not last or any(point is None for point in last):
            return None
        return torch.tensor(last).sum(0).tolist()

    def to_dict(self) -> dict[str, dict[str, list[Any]]]:
        """``{layer: {"steps": [...], "alive": [...], ...}}``, plain data, a copy."""
        return {
            name: {column: list(values) for column, values in columns.items()}
            for name, columns in self.layers.items()
        }

    def load_dict(self, state: dict[str, dict[str, list[Any]]]) -> None:
        """Take back what ``to_dict`` gave, for the layers that this history has."""
        for name in self.layers:
            self.layers[name] = {column: list(values) for column, values in state[name].items()}


@final
class Observed:
    """What passed through the routers while ``observe`` was watching, in any mode."""

    def __init__(self, layers: dict[str, ExpertLayer]) -> None:
        self._layers = layers
        self._tallies = {
            name: Tally(layer.router.active.numel(), layer.router.dim)
            for name, layer in layers.items()
        }

    def see(self, name: str, k: Tensor, counts: Tensor, unserved: Tensor | None) -> None:
        """Add one routing of the layer ``name``; k: (T,), counts: (E,), unserved: (T,) bool."""
        tally = self._tallies[name]
        tally.tokens = tally.tokens.to(k.device) + k.shape[0]
        tally.load = tally.load.to(k.device) + counts
        tally.k_counts = tally.k_counts.to(k.device) + torch.bincount(
            k, minlength=tally.k_counts.numel()
        )
        if unserved is not None:
            tally.unserved = tally.unserved.to(k.device) + unserved.sum()

    def statistics(self) -> dict[str, Point]:
        """By layer: tokens, alive, active, mean_k, unserved, load, k_counts; plain data."""
        return {
            name: self._tallies[name].point(layer.router.active)
            for name, layer in self._layers.items()
        }


def _named(model: nn.Module) -> dict[str, ExpertLayer]:
    from sparing.experts.layer import expert_layers

    return {
        layer.name or f"layer{index}": layer for index, layer in enumerate(expert_layers(model))
    }


@contextmanager
def observe(model: nn.Module) -> Iterator[Observed]:
    """A context that counts what every expert layer routes, in training or evaluation.

    ``with observe(model) as seen: model(x)``, then ``seen.statistics()``. Training's own record
    is not touched. Padding counts as tokens with no expert.
    """
    layers = _named(model)
    seen = Observed(layers)

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, routing: Any) -> None:
            seen.see(name, routing.k, routing.counts, routing.unserved)

        return hook

    handles = [layer.router.register_forward_hook(watch(n)) for n, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def statistics(model: nn.Module) -> dict[str, Point]:
    """What each expert layer has recorded since the last optimizer step, by layer; plain data.

    A training loop with an ExpertController empties the records at every step: its ``history``
    has the course of training, and ``observe`` counts any pass, evaluation too.
    """
    found = {}
    for name, layer in _named(model).items():
        tally = Tally(layer.router.active.numel(), layer.router.dim)
        tally.add(layer.record)
        found[name] = tally.point(layer.router.active)
    return found
