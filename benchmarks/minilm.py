"""MiniLM on AG News as the recipe adapters-text has it, for measurements of adapters."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from sparing.run.recipe import Recipe, load

ROWS, LENGTH = 16, 64


def recipe() -> Recipe:
    """The recipe with its preset; its data is looked for in $SPARING_DATA."""
    return load("adapters-text", preset="agnews")


def task() -> Any:
    """The task with its texts, tokenised."""
    made = recipe().build_task()
    made.prepare(0)
    return made


def batches(texts: Any, count: int, rows: int = ROWS) -> list[dict[str, Tensor]]:
    """Batches in the order of the first epoch of seed 0, padded to the longest of each."""
    order = texts.order(0, torch.Generator().manual_seed(0))
    return [texts.train.batch(part) for part in itertools.islice(order.split(rows), count)]


def loss(texts: Any) -> Any:
    """``loss(model, batch)``, the mean cross entropy."""

    def of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = texts.losses(model, batch)[0].mean()
        return found

    return of


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
