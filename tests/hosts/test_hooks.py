"""In which order the installed trainers call what the hosts stand between."""

from __future__ import annotations

from typing import Any

import torch
from pruning import Points
from trainers import trainer
from transformers import TrainerCallback


def test_the_trainer_calls_what_the_host_stands_between_in_the_expected_order(tmp_path):
    """Without any host: a release that moves one of these calls is told by its place here."""
    calls: list[str] = []
    made = trainer(tmp_path, data=Points(12), num_train_epochs=1, gradient_accumulation_steps=2)

    def noting(owner: Any, name: str, told: str | None = None) -> None:
        plain = getattr(owner, name)

        def noted(*given: Any, **named: Any) -> Any:
            more = f" {made.accelerator.sync_gradients}" if name == "training_step" else ""
            calls.append((told or name) + more)
            return plain(*given, **named)

        setattr(owner, name, noted)

    class Watching(TrainerCallback):
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            noting(made.lr_scheduler, "step", "scheduler.step")
            noting(made.optimizer.optimizer, "step", "optimizer.step")

        def on_step_end(self, *given: Any, **named: Any) -> None:
            assert all(p.grad is None for p in made.model.parameters())
            calls.append("on_step_end")

        def on_epoch_end(self, *given: Any, **named: Any) -> None:
            calls.append("on_epoch_end")

    for name in ("get_train_dataloader", "_init_training_state", "create_optimizer"):
        noting(made, name)
    for name in ("create_scheduler", "_run_epoch", "training_step", "compute_loss"):
        noting(made, name)
    noting(made.accelerator, "clip_grad_norm_")
    made.add_callback(Watching())
    made.train()
    step = ["clip_grad_norm_", "optimizer.step", "scheduler.step", "on_step_end"]
    assert calls == [
        "get_train_dataloader", "_init_training_state", "create_optimizer", "create_scheduler",
        "_run_epoch",
        "training_step False", "compute_loss", "training_step True", "compute_loss", *step,
        "training_step True", "compute_loss", *step,
        "on_epoch_end",
    ], "transformers changed the order of these calls, on which hosts/hf.py relies"  # fmt: skip


def test_clipping_unscales_through_the_method_that_the_host_replaces(tmp_path):
    made = trainer(tmp_path)
    calls: list[str] = []
    made.accelerator.unscale_gradients = lambda *given: calls.append("unscale")
    made.accelerator.clip_grad_norm_([torch.nn.Parameter(torch.zeros(1))], 1.0)
    assert calls == ["unscale"], "accelerate no longer unscales by its own method when it clips"
