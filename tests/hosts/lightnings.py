"""Lightning modules and trainers on tiny data, as plain as they come."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from pruning import Classifier, Points
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Module(L.LightningModule):
    """Trains a classifier, or a language model; ``methods`` is None for plain training."""

    def __init__(self, methods: Any = None, model: Any = None, *, rate: str = "linear") -> None:
        super().__init__()
        self.methods, self.rate = methods, rate
        self.model = Classifier() if model is None else model
        self.rates: list[float] = []
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def each(self, batch: Any) -> tuple[Tensor, Any]:
        if "input_ids" in batch:
            ids = batch["input_ids"]
            outputs = self.model(input_ids=ids, use_cache=False)
            logits = outputs.logits[:, :-1].transpose(1, 2)
            return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(
                1
            ), outputs
        logits = self.model(batch["x"])["logits"]
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none"), logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, outputs = self.each(batch)
        self.log("train_loss", losses.mean())
        if self.methods is None:
            return losses.mean()
        return self.methods.loss(losses, outputs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append([int(i) for i in batch["extra"]])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if self.rate == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def loader(data: Any = None, **options: Any) -> DataLoader[Any]:
    given = {"batch_size": 4, "shuffle": True}
    return DataLoader(Points() if data is None else data, **{**given, **options})


def trainer(path: Path, *callbacks: Any, **options: Any) -> L.Trainer:
    given: dict[str, Any] = {
        "default_root_dir": str(path),
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**given, **options})


def fit(made: L.Trainer, module: Module, *given: Any, **named: Any) -> None:
    with warnings.catch_warnings():
        # its advice, and what it says of its own use of torch
        warnings.filterwarnings("ignore", module=r"lightning\.")
        made.fit(module, *given, **named)
