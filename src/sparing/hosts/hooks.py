"""What the hosts rely on inside of transformers, accelerate and Lightning, checked before use.

These libraries promise nothing about most of it. A release that changes one of them is told by its
name, when methods are attached and in the tests, and not by a wrong number.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any, final

from sparing.core.errors import RequestError


@final
@dataclass(frozen=True, slots=True)
class Hook:
    """``owner`` is ``"module:Class"``; ``parameters`` are those that a host passes or takes."""

    owner: str
    name: str
    parameters: tuple[str, ...] = ()
    why: str = ""

    def fault(self) -> str | None:
        """What is not as expected in the installed version, None if all is."""
        module, _, cls = self.owner.partition(":")
        try:
            owner: Any = getattr(importlib.import_module(module), cls)
        except (ImportError, AttributeError) as error:
            return f"{self.owner} is not there ({error})"
        found = getattr(owner, self.name, None)
        if found is None:
            return f"{cls}.{self.name} is not there"
        if not callable(found):
            return None
        known = inspect.signature(found).parameters
        missing = [name for name in self.parameters if name not in known]
        if missing:
            return f"{cls}.{self.name}({', '.join(known)}) has no parameter {', '.join(missing)}"
        return None


_TRAINER = "transformers.trainer:Trainer"
_CALLBACK = "transformers.trainer_callback:TrainerCallback"

HF: tuple[Hook, ...] = (
    Hook(
        _TRAINER,
        "_run_epoch",
        (
            "model",
            "epoch",
            "train_dataloader",
            "steps_in_epoch",
            "num_update_steps_per_epoch",
            "epochs_trained",
            "steps_trained_in_current_epoch",
        ),
        "an epoch is as long as its plan",
    ),
    Hook(
        _TRAINER,
        "_init_training_state",
        (
            "max_steps",
            "num_update_steps_per_epoch",
            "num_train_epochs",
            "resume_from_checkpoint",
            "trial",
        ),
        "a resumed run stands where the plan says",
    ),
    Hook(_TRAINER, "get_train_dataloader", (), "batches are those of the plan"),
    Hook(_TRAINER, "training_step", ("model", "inputs", "num_items_in_batch"), "grads, unclipped"),
    Hook(
        _TRAINER,
        "compute_loss",
        ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "losses per sample",
    ),
    Hook(_TRAINER, "create_optimizer", ("model",), "the optimizer seam"),
    Hook(_TRAINER, "create_scheduler", ("num_training_steps",), "the rate follows the plan"),
    Hook(_TRAINER, "evaluation_loop", ("dataloader", "description"), "the evaluating seam"),
    Hook(_TRAINER, "log", ("logs",), "signals are logged"),
    Hook(_CALLBACK, "on_step_end", ("state", "control"), "the step seam"),
    Hook(_CALLBACK, "on_save", ("args", "state"), "the methods' state in checkpoints"),
    Hook("accelerate:Accelerator", "sync_gradients", (), "which micro-batch ends a step"),
    Hook("accelerate:Accelerator", "unscale_gradients", ("optimizer",), "grads, unscaled"),
    Hook(
        "accelerate:Accelerator",
        "clip_grad_norm_",
        ("parameters", "max_norm", "norm_type"),
        "clipping comes after grads",
    ),
    Hook("accelerate:Accelerator", "optimizer_step_was_skipped", (), "clocks count steps"),
    Hook("accelerate:Accelerator", "unwrap_model", (), "the model without DDP's wrapper"),
)

_FIT = "lightning.pytorch.loops.fit_loop:_FitLoop"
_MODULE = "lightning.pytorch:LightningModule"
_CALLBACKS = "lightning.pytorch:Callback"

LIGHTNING: tuple[Hook, ...] = (
    Hook(
        "lightning.pytorch.trainer.connectors.data_connector:_DataLoaderSource",
        "dataloader",
        (),
        "batches are those of the plan",
    ),
    Hook(_FIT, "setup_data", (), "batches are those of the plan"),
    Hook(_MODULE, "_call_batch_hook", ("hook_name",), "a batch's context travels with it"),
    Hook(_MODULE, "configure_model", (), "the prepare seam, before the optimizer exists"),
    Hook(_MODULE, "configure_optimizers", (), "the optimizer seam"),
    Hook(_MODULE, "log", ("name", "value"), "a rehearsal logs nothing"),
    Hook(_CALLBACKS, "on_before_optimizer_step", ("optimizer",), "grads, unscaled and unclipped"),
    Hook(_CALLBACKS, "on_after_backward", (), "the position in the plan"),
    Hook(_CALLBACKS, "on_train_batch_end", ("batch", "batch_idx"), "the step seam"),
    Hook(_CALLBACKS, "state_dict", (), "the methods' state in checkpoints"),
    Hook(
        "lightning.pytorch.plugins.precision:Precision",
        "clip_grad_by_norm",
        ("optimizer", "clip_val"),
        "a global norm of sparse gradients",
    ),
    Hook("lightning.pytorch:Trainer", "num_training_batches", (), "an epoch's length"),
    Hook("lightning.pytorch:Trainer", "lr_scheduler_configs", (), "the rate follows the plan"),
)


def check(hooks: tuple[Hook, ...], package: str) -> None:
    """Raise RequestError, naming what changed, if the installed ``package`` is not as expected."""
    for hook in hooks:
        fault = hook.fault()
        if fault is not None:
            version = getattr(importlib.import_module(package), "__version__", "?")
            raise RequestError(
                f"{package} {version} changed what this host relies on ({hook.why}): {fault}. "
                f"Install a version of {package} that this version of sparing was tested with, or "
                "a newer sparing"
            )
