"""What ``attach`` refuses, each with the way out."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from sparing.core.errors import RequestError
from sparing.core.method import Method, implements


def check(trainer: Any, methods: list[Method], losses: Any) -> None:
    """Raise RequestError if this trainer cannot train with these methods and losses."""
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise RequestError(
            f"attach takes a transformers.Trainer, got {type(trainer).__name__}; for a plain loop "
            "use sparing.Session, for Lightning sparing.LightningMethods"
        )
    if not (losses in ("auto", "scalar") if isinstance(losses, str) else callable(losses)):
        raise RequestError(
            f'losses must be "auto", "scalar" or a callable losses(model, batch), got {losses!r}'
        )
    if getattr(trainer, "sparing", None) is not None:
        raise RequestError("methods are attached to this trainer already; give all in one call")
    _check_data(trainer.train_dataset)
    _check_arguments(trainer)
    _check_seams(trainer, methods, losses)


def _check_data(data: Any) -> None:
    if data is None:
        raise RequestError("the trainer has no train_dataset; give it one before attaching")
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise RequestError(
            f"the train_dataset, a {type(data).__name__}, is a stream: it has no samples by index, "
            "so none can be chosen or left out. Load it as a map-style data set (load_dataset(..., "
            "streaming=False), or Dataset.from_generator), or choose within the stream before it "
            "reaches the trainer (its filter() and skip())"
        )
    try:
        len(data)
    except TypeError:
        raise RequestError(
            f"the train_dataset, a {type(data).__name__}, has no length; give it a __len__, or "
            "load the stream as a map-style data set"
        ) from None


def _check_arguments(trainer: Any) -> None:
    args, parallel = trainer.args, trainer.accelerator
    if args.n_gpu > 1:
        raise RequestError(
            f"this process drives {args.n_gpu} GPUs by DataParallel, which replicates modules in "
            "every step; start one process for each GPU: torchrun --nproc-per-node "
            f"{args.n_gpu} ..."
        )
    if trainer.model_init is not None:
        raise RequestError(
            "model_init builds the model anew at train(), without what methods prepared; give the "
            "trainer model=... instead"
        )
    if args.auto_find_batch_size:
        raise RequestError(
            "auto_find_batch_size starts training again in the middle, with methods that have "
            "moved on; set per_device_train_batch_size"
        )
    if getattr(args, "train_sampling_strategy", "random") == "batch_rebalance":
        raise RequestError(
            'train_sampling_strategy="batch_rebalance" makes batches of its own, and batches are '
            'those of the plan here; use "random", "sequential" or "group_by_length"'
        )
    if getattr(args.accelerator_config, "split_batches", False):
        raise RequestError(
            "split_batches of accelerator_config cuts batches over the ranks; leave it off: "
            "per_device_train_batch_size is the batch of each rank"
        )
    sizes = [getattr(trainer, f"get_{kind}_size")() for kind in ("tp", "cp", "sp")]
    if any(size > 1 for size in sizes):
        raise RequestError(
            "tensor, context and sequence parallelism share one sample among ranks, which this "
            "host does not deal; use data parallelism (DDP, FSDP)"
        )
    if parallel.distributed_type == "DEEPSPEED":
        raise RequestError(
            "DeepSpeed clips and steps inside its engine, where no seam reaches; use DDP or FSDP"
        )


def _check_seams(trainer: Any, methods: list[Method], losses: Any) -> None:
    from transformers import Trainer

    args = trainer.args
    planning = [m.name for m in methods if implements(m, "order")]
    if planning and (args.max_steps > 0 or args.num_train_epochs != int(args.num_train_epochs)):
        asked = (
            f"max_steps={args.max_steps}"
            if args.max_steps > 0
            else f"num_train_epochs={args.num_train_epochs}"
        )
        raise RequestError(
            f'"{planning[0]}" plans whole epochs, each as long as what it keeps, and {asked} would '
            "cut them; set num_train_epochs to a whole number and leave max_steps alone"
        )
    building = [m.name for m in methods if implements(m, "prepare") or implements(m, "optimizer")]
    if building and trainer.optimizer is not None:
        raise RequestError(
            f'"{building[0]}" changes the model or its parameter groups, and this trainer was '
            "given an optimizer that was built before; use optimizer_cls_and_kwargs=, which builds "
            "it when training starts"
        )
    each = [m.name for m in methods if implements(m, "loss") and m.loss_stage != "batch"]
    if not each or losses != "auto":
        return
    own = (
        "a compute_loss_func"
        if trainer.compute_loss_func is not None
        else "a compute_loss of its own"
        if type(trainer).compute_loss is not Trainer.compute_loss
        else None
    )
    if own is not None:
        raise RequestError(
            f'"{each[0]}" needs the loss of each sample, and this trainer has {own}, which gives '
            "one number; pass losses=f with f(model, batch) -> (losses of shape (B,), outputs)"
        )
