"""Trainers of Hugging Face and of Lightning on tiny data, as plain as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pruning import Classifier, Points
from transformers import Trainer, TrainingArguments


def arguments(path: Path, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(path),
        "num_train_epochs": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**given, **options})


def trainer(path: Path, model: Any = None, data: Any = None, **options: Any) -> Trainer:
    of_trainer = {
        key: options.pop(key)
        for key in (
            "optimizers", "compute_loss_func", "data_collator", "eval_dataset", "model_init",
            "callbacks",
        )
        if key in options
    }  # fmt: skip
    if "model_init" not in of_trainer:
        of_trainer["model"] = Classifier() if model is None else model
    return Trainer(
        args=arguments(path, **options),
        train_dataset=Points() if data is None else data,
        **of_trainer,
    )


def rates(made: Trainer) -> list[float]:
    """The learning rate of each step."""
    return [entry["learning_rate"] for entry in made.state.log_history if "loss" in entry]
