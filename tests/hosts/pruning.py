"""A small method that leaves samples out and weighs the rest, and what trainers are built of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from toys import LENGTH, VOCABULARY

import sparing
from sparing.core import ranks
from sparing.core.method import Context, Method, Plan


@final
@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    ratio: float = 0.5
    full: int = 1
    """Epochs at the end that take every sample."""


@final
class Prune(Method):
    """Leaves out a share of the samples with a loss below the mean; the kept of them weigh more."""

    name = "prune"
    Options = PruneOptions
    loss_stage = "weight"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scores = torch.empty(0)
        self.spared = 0
        self.seen: list[list[int]] = []
        """The samples of each epoch, as they came to ``loss`` on this rank."""
        self.lengths: list[int] = []
        self.ended: list[int] = []

    def bind(self, *, size: Any = None, epochs: Any = None, seed: int = 0, **known: Any) -> None:
        self.size, self.epochs, self.seed = size, epochs, seed
        if not len(self.scores):
            self.scores = torch.full((size,), 1e6)
            self.fresh = torch.zeros(size)

    def order(self, clock: sparing.Clock) -> Plan:
        generator = torch.Generator().manual_seed(self.seed * 1000 + clock.epoch)
        index, weight = torch.arange(self.size), torch.ones(self.size)
        if 0 < clock.epoch < self.epochs - self.options.full:
            low = (self.scores <= self.scores.mean()).nonzero().flatten()
            low = low[torch.randperm(len(low), generator=generator)]
            out = low[: int(self.options.ratio * len(low))]
            kept = torch.ones(self.size, dtype=torch.bool)
            kept[out] = False
            weight[low] = len(low) / max(1, len(low) - len(out))
            index, weight = index[kept], weight[kept]
            self.spared += len(out)
        shuffle = torch.randperm(len(index), generator=generator)
        self.lengths.append(len(index))
        self.seen.append([])
        return Plan(index[shuffle], weight[shuffle])

    def loss(self, losses: Tensor, context: Context, outputs: Any) -> Tensor:
        assert context.weight is not None
        self.scores[context.index[:, 0]] = losses.detach().float().cpu()
        self.fresh[context.index[:, 0]] = 1
        if not self.seen:  # resumed in the middle of an epoch
            self.seen.append([])
        self.seen[-1] += context.index[:, 0].tolist()
        return losses * context.weight.to(losses.device)

    def step(self, clock: sparing.Clock, optimizer: Any) -> None:
        if clock.epoch_ended:
            self.ended.append(clock.step)
            # each rank knows the scores of the samples that it saw
            found, fresh = self.scores * self.fresh, self.fresh.clone()
            ranks.sum_([found, fresh])
            self.scores = torch.where(fresh > 0, found / fresh.clamp_min(1), self.scores)
            self.fresh.zero_()

    def account(self, ledger: sparing.Ledger) -> None:
        if ranks.rank() == 0:  # the plan is one; accounts of ranks add up
            ledger.add("samples", spent=0, dense=self.spared)
        self.spared = 0

    def signals(self) -> dict[str, Any]:
        return {"mean": float(self.scores.mean())}

    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": self.scores.clone(),
            "fresh": self.fresh.clone(),
            "spared": self.spared,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.fresh = state["scores"].clone(), state["fresh"].clone()
        self.spared = state["spared"]


@final
class Sentences(Dataset[Any]):
    """As a tokenizer leaves them; ``extra`` is a column that no model takes."""

    def __init__(self, samples: int = 26) -> None:
        generator = torch.Generator().manual_seed(2)
        first = torch.randint(VOCABULARY, (samples, 1), generator=generator)
        stride = torch.randint(1, 4, (samples, 1), generator=generator)
        self.ids = (first + stride * torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.ids[index], "extra": index}


@final
class Points(Dataset[Any]):
    """x: (3,), labels: 0 or 1; x[0] is the index."""

    def __init__(self, samples: int = 26) -> None:
        self.x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(3))
        self.y = (self.x.sum(1) > 0).long()
        self.x[:, 0] = torch.arange(samples)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "labels": self.y[index], "extra": index}


@final
class Classifier(nn.Module):
    """A model of the trainer's that is none of transformers: logits and, with labels, its loss."""

    def __init__(self, seed: int = 0, dropout: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2)
            )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x / 10)
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = nn.functional.cross_entropy(logits, labels)
        return found
