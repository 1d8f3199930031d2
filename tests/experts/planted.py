"""Data with a known number of clusters, each with its own linear map, for a single expert layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparing.experts.controller import ControllerOptions, Event, ExpertController
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer
from sparing.experts.top_any import TopAnyOptions, TopAnyRouter


class Planted:
    """x: (n, d) around orthogonal centres; y: (n, d), the cluster's linear map of x plus noise."""

    def __init__(self, clusters: int, dim: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        square = torch.randn(dim, clusters, generator=generator)
        self.centres = torch.linalg.qr(square).Q.t() * math.sqrt(dim)
        self.maps = torch.randn(clusters, dim, dim, generator=generator) / math.sqrt(dim)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        clusters, dim, _ = self.maps.shape
        cluster = torch.randint(clusters, (size,), generator=generator)
        x = self.centres[cluster] + 0.5 * torch.randn(size, dim, generator=generator)
        y = torch.einsum("nd,ndo->no", x, self.maps[cluster])
        return x, y + 0.3 * torch.randn(y.shape, generator=generator), cluster


def small_layer(
    slots: int = 6, start: int | None = 3, dim: int = 8, seed: int = 0, **options: Any
) -> ExpertLayer:
    """A layer of plain experts behind a top-any router."""
    chosen = TopAnyOptions(max_experts=slots, start_experts=start, **options)
    experts = Experts(dim, 2 * dim, slots, gated=False, bias=True, activation="relu")
    experts.init_(generator=torch.Generator().manual_seed(seed))
    return ExpertLayer(TopAnyRouter(dim, chosen, seed), experts, name="layer")


class Run:
    """A training run of one layer on planted data, with the controller, that can be stopped."""

    def __init__(
        self,
        *,
        start: int,
        seed: int = 0,
        clusters: int = 4,
        dim: int = 16,
        slots: int = 12,
        size: int = 128,
        router: dict[str, Any] | None = None,
        adapt: ControllerOptions | None = None,
        use_probe: bool = True,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        **rates: Any,
    ) -> None:
        self.data = Planted(clusters, dim, seed)
        router = {"target_k": 1.0} if router is None else router
        self.layer = small_layer(slots, start, dim, seed, **router)
        self.layer.train()
        self.controller = ExpertController([("layer", self.layer)], adapt, seed=seed)
        trained = [p for p in self.layer.parameters() if p.requires_grad]
        self.optimizer = optimizer(trained, **({"lr": 3e-3} | rates))
        self.generator = torch.Generator().manual_seed(seed + 77)
        self.size, self.at = size, 0
        self.held = self.data.batch(512, torch.Generator().manual_seed(seed + 5))
        self.use_probe = use_probe
        self.alive: list[int] = []
        self.events: list[Event] = []

    @torch.no_grad()
    def probe(self) -> Tensor:
        self.layer.eval()
        x, y, _ = self.held
        loss = (self.layer(x) - y).square().mean()
        self.layer.train()
        return loss

    def backward(self) -> None:
        x, y, _ = self.data.batch(self.size, self.generator)
        loss = (self.layer(x) - y).square().mean()
        loss = loss + sum(self.layer.take_losses().values(), torch.zeros(()))
        self.optimizer.zero_grad()
        loss.backward()

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
            self.at += 1
            self.events += self.controller.step(
                self.at, self.optimizer, probe=self.probe if self.use_probe else None
            )
            self.alive.append(int(self.layer.router.active.sum()))
        return self

    def state(self) -> dict[str, Any]:
        return {
            "layer": self.layer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state_dict(),
            "generator": self.generator.get_state(),
            "at": self.at,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.layer.load_state_dict(state["layer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.controller.load_state_dict(state["controller"])
        self.generator.set_state(state["generator"])
        self.at = state["at"]
