"""Methods in Hugging Face's Trainer, by one line between building it and training::

    trainer = Trainer(model=model, args=arguments, train_dataset=data, ...)
    attached = sparing.attach(trainer, [sparing.TopAny(max_experts=8)])
    trainer.train()
    print(attached.account())

The trainer stays what it is: its own arguments, collator, clipping, schedule, logs, evaluation,
checkpoints. Only batches are dealt here, so that each one carries its samples' identity, and an
epoch is as long as its plan. ``num_train_epochs`` counts; ``max_steps`` is never set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Context, Method, Setup, arrange, implements
from sparing.core.sparse_gradients import any_sparse, clip_norm_
from sparing.hosts import hf_requests, hf_state, hooks, loading
from sparing.hosts.dry_run import rehearse
from sparing.hosts.epochs import Epochs, Geometry
from sparing.hosts.following import Following
from sparing.hosts.groups import regroup_
from sparing.hosts.hf_loss import TrainerLoss
from sparing.hosts.host import Host
from sparing.hosts.per_sample import Losses

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'methods in the Trainer need "{error.name}": pip install "sparing[hf]"', name=error.name
    ) from error

CONTEXT = "sparing_context"  # the key under which a batch carries its context


def attach(
    trainer: Any,
    methods: Iterable[Method],
    losses: Literal["auto", "scalar"] | Losses = "auto",
    *,
    dry_run: bool = True,
) -> Attached:
    """Bind methods to a ``transformers.Trainer`` that has not trained yet.

    Args:
        trainer: built with its model, arguments and a map-style ``train_dataset``.
        methods: constructed methods; their order and conflicts are checked here.
        losses: who computes the loss of each sample. ``"auto"``: from logits and labels, for
            causal and masked language models (mean over a sequence's tokens), sequence, image and
            token classification, regression. A callable ``losses(model, batch) -> ((B,), outputs)``
            for anything else. ``"scalar"``: the model's own loss, the same for all samples of a
            micro-batch. Where no method looks at losses per sample, ``"auto"`` leaves the loss to
            the trainer, token normalisation and all.
        dry_run: try one batch through every seam, on copies, before any compute is spent.

    Raises RequestError for what cannot work, before anything is trained.
    """
    return Attached(trainer, arrange(methods), losses, dry_run)


@final
class Attached(Host):
    """The methods that are bound to a trainer; ``attach`` makes it."""

    def __init__(
        self,
        trainer: Any,
        methods: list[Method],
        losses: Literal["auto", "scalar"] | Losses,
        dry_run: bool,
    ) -> None:
        hooks.check(hooks.HF, "transformers")
        hf_requests.check(trainer, methods, losses)
        self._start(methods)
        self.trainer = trainer
        args, self._world = trainer.args, int(trainer.accelerator.num_processes)
        self._plans = any(implements(method, "order") for method in methods)
        self._loss = TrainerLoss(trainer, methods, losses)
        self._plain: dict[str, Any] = {}
        self._context: Context | None = None
        self._unscaled = False

        self._source = trainer.get_train_dataloader()
        self._domain_of, self._domains = loading.domains_of(trainer.train_dataset)
        geometry = Geometry(
            batch_size=args.per_device_train_batch_size,
            accumulate=args.gradient_accumulation_steps,
            world=self._world,
            drop_last=args.dataloader_drop_last,
        )
        size = len(trainer.train_dataset)
        dense = geometry.steps(geometry.micro_batches(size))
        if dense == 0:
            raise RequestError(
                f"{size} samples make no batch of {geometry.batch_size} on {self._world} ranks"
            )
        whole = args.max_steps <= 0 and args.num_train_epochs == int(args.num_train_epochs)
        self.clock.epochs = int(args.num_train_epochs) if whole else None
        self.clock.steps = (
            args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * dense)
        )
        self.epochs = Epochs(
            methods, size=size, geometry=geometry, order=self._sampled, clock=self.clock
        )
        self._prepare(args)
        bound = {
            "size": size,
            "epochs": self.clock.epochs,
            "steps": self.clock.steps,
            "seed": args.seed,
        }
        if dry_run:
            self._dry_run(bound)
        for method in methods:
            method.bind(**bound, model=trainer.model, probe=lambda: self._probe_of(self._model))
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        self.ledger.set_level("parameters", spent=trained)
        self._install()

    # ---- before training ----------------------------------------------------------------------

    def _prepare(self, args: Any) -> None:
        trainer = self.trainer
        setup = Setup(
            seed=args.seed,
            steps=self.clock.steps,
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
            device=str(args.device),
            world_size=self._world,
            batches=self._shuffled,
            read=self._read,
            size=len(trainer.train_dataset),
            domain_of=self._domain_of,
            domains=self._domains,
            loss=lambda model, batch: self._loss.each(model, batch)[0].mean(),
        )
        model = trainer.model
        for method in self.methods:
            model = method.prepare(model, setup)
        if trainer.place_model_on_device:
            model = model.to(args.device)
        trainer.model = trainer.model_wrapped = model

    def _dry_run(self, bound: dict[str, Any]) -> None:
        def first(methods: list[Method]) -> tuple[Any, Context]:
            batch, context = self.epochs.first(methods, **self._reading(workers=0))
            batch = loading.to_device(self._mapping(batch), self.trainer.args.device)
            return self._prepared(methods, batch, context), context

        rehearse(
            self.trainer.model,
            self.methods,
            clock=self.clock,
            bound=bound,
            first=first,
            losses=self._loss.each,
            device=self.trainer.args.device,
        )

    def _shuffled(self) -> Iterator[Any]:
        reading = self._reading(workers=0)
        for batch in self.epochs.shuffled(by=self.trainer.args.seed, **reading):
            yield self._mapping(batch)

    def _read(self, index: Tensor) -> Any:
        batch = loading.read(self._source.dataset, index, self._source.collate_fn)
        return loading.to_device(self._mapping(batch), self.trainer.args.device)

    def _install(self) -> None:
        """Put this object's methods before the trainer's, which stay reachable in ``_plain``."""
        for name in (
            "get_train_dataloader",
            "_init_training_state",
            "_run_epoch",
            "training_step",
            "compute_loss",
            "create_optimizer",
            "create_scheduler",
            "evaluation_loop",
            "log",
        ):
            self._plain[name] = getattr(self.trainer, name)
            setattr(
                self.trainer, name, getattr(self, f"_on{name if name[0] == '_' else '_' + name}")
            )
        self._plain["unscale"] = self.trainer.accelerator.unscale_gradients
        self.trainer.accelerator.unscale_gradients = self._unscale_once
        self._plain["clip"] = self.trainer.accelerator.clip_grad_norm_
        self.trainer.accelerator.clip_grad_norm_ = self._clip_norm
        self.trainer.add_callback(_Callback(self))
        self.trainer.sparing = self

    # ---- epochs and batches -------------------------------------------------------------------

    def _on_get_train_dataloader(self) -> Any:
        self._source = self._plain["get_train_dataloader"]()
        return _Dealt(self)

    def _sampled(self, epoch: int) -> Tensor:
        """The order in which the trainer's own sampler would give the samples."""
        batches = self._source.batch_sampler
        while hasattr(batches, "batch_sampler"):  # accelerate's, around the one of all ranks
            batches = batches.batch_sampler
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(epoch)
        return torch.tensor(list(batches.sampler), dtype=torch.int64)

    def _reading(self, workers: int | None = None) -> dict[str, Any]:
        """How the trainer would read its data; the seed of workers is this library's own."""
        source, args = self._source, self.trainer.args
        return loading.reading(
            source,
            workers=workers,
            seed=args.seed * 1_000_003 + self.clock.epoch,
            pin_memory=source.pin_memory and args.device.type == "cuda",
        )

    def _on_init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        self._plain["_init_training_state"](
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            self.load(Path(resume_from_checkpoint) / hf_state.DIRECTORY)
        elif self.clock.step:
            raise RequestError(
                "this trainer has trained already, and its methods stand where that ended; resume "
                "from a checkpoint, or attach new methods to a new trainer"
            )
        return self.clock.epoch, 0  # the loader itself begins where the plan stands

    def _on_run_epoch(self, **given: Any) -> None:
        self.epochs.begin(len(self._source.dataset))
        remaining = self.epochs.remaining
        self._expect()
        given |= {
            "epoch": self.clock.epoch,
            "train_dataloader": _Dealt(self),
            "steps_in_epoch": remaining,
            "num_update_steps_per_epoch": self.epochs.geometry.steps(remaining),
            "steps_trained_in_current_epoch": 0,
        }
        self._plain["_run_epoch"](**given)

    def _expect(self) -> None:
        """Tell trainer and methods how many steps there will be: a bound, exact in the end."""
        if self._plans:
            left = self.epochs.bound() - self.clock.step
            self.clock.steps = self.clock.step + left
            self.trainer.state.max_steps = self.trainer.state.global_step + left

    # ---- a micro-batch ------------------------------------------------------------------------

    def _on_training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        context = inputs[CONTEXT]
        kept = {key: value for key, value in inputs.items() if key != CONTEXT}
        self._context = context
        try:
            loss: Tensor = self._plain["training_step"](model, kept, num_items_in_batch)
        finally:
            self._context = None
        self.epochs.done += 1
        self.epochs.tell()
        if self.trainer.accelerator.sync_gradients:
            self._grads(context)
        return loss

    def _on_compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        context = self._context
        if context is None:  # evaluation
            return self._plain["compute_loss"](
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        batch = self._prepared(self.methods, dict(inputs), context)
        self._count(self._model, batch, context)
        loss, outputs = self._loss.trained(model, batch, context, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _mapping(self, batch: Any) -> dict[str, Any]:
        if not isinstance(batch, Mapping):
            raise RequestError(
                f"the collator gives a {type(batch).__name__}; the trainer's models take their "
                "inputs by name: give it a data_collator that returns a dict"
            )
        return dict(batch)

    def _mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self._loss.mean(model, batch)

    @property
    def _current(self) -> Epochs:
        return self.epochs

    @property
    def _model(self) -> nn.Module:
        plain: nn.Module = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return plain

    # ---- a step -------------------------------------------------------------------------------

    def _unscale_once(self, optimizer: Any = None) -> None:
        """The scaler refuses to unscale twice; clipping, which comes after us, would ask it to."""
        if not self._unscaled:
            self._plain["unscale"](optimizer)

    def _clip_norm(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """The trainer asks for a norm in every step; torch has none of sparse gradients."""
        every = list(parameters)
        if norm_type != 2 or not any_sparse(every):
            return self._plain["clip"](every, max_norm, norm_type)
        self._unscale_once()
        return clip_norm_(every, max_norm)

    def _grads(self, context: Context) -> None:
        changing = [method for method in self.methods if implements(method, "grads")]
        if not changing:
            return
        self._unscale_once()
        self._unscaled = True
        for method in changing:
            method.grads(self._model.named_parameters(), context)

    def stepped(self) -> None:
        """After the optimizer's step, the schedule's, and the clearing of gradients."""
        self._unscaled = False
        trainer, clock = self.trainer, self.clock
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        if not trainer.accelerator.optimizer_step_was_skipped:
            self._step(optimizer)
        trainer.state.epoch = clock.epoch + clock.place / clock.length
        if self.epochs.finished:  # now, not at on_epoch_end: a checkpoint may be written before
            self.epochs.end(optimizer)

    def _on_create_optimizer(self, model: Any = None) -> Any:
        fresh = self.trainer.optimizer is None
        optimizer = self._plain["create_optimizer"](model)
        if fresh:
            regroup_(optimizer, self.trainer.model if model is None else model, self.methods)
        return optimizer

    def _on_create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = self._plain["create_scheduler"](num_training_steps, optimizer)
        by_metric = isinstance(scheduler, ReduceLROnPlateau)
        by_metric = by_metric or type(scheduler).__name__ == "GreedyLR"
        if self._plans and not by_metric and not isinstance(scheduler, Following):
            scheduler = Following(
                scheduler,
                total=num_training_steps,
                progress=lambda: self.clock.by_epochs or (0, 1),
            )
            self.trainer.lr_scheduler = scheduler
        return scheduler

    # ---- beside training ----------------------------------------------------------------------

    def _on_evaluation_loop(self, *given: Any, **named: Any) -> Any:
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.evaluating(self._model))
            return self._plain["evaluation_loop"](*given, **named)

    def _on_log(self, logs: dict[str, Any], *given: Any, **named: Any) -> None:
        if "loss" in logs:
            for method in self.methods:
                for key, value in method.signals().items():
                    if isinstance(value, int | float):
                        logs[f"{method.name}/{key}"] = value
        self._plain["log"](logs, *given, **named)

    # ---- state --------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write what continues the methods bit for bit; every rank writes its own part."""
        hf_state.write(Path(directory), self._state(self.ledger), self._world)

    def load(self, directory: str | Path) -> None:
        """Take back what ``save`` wrote, on as many ranks as there are now.

        Raises RequestError if it is of other methods or other data, RunError if there is none.
        """
        saved = hf_state.read(Path(directory), self._world)
        self._continue(saved, self.trainer.args.device)
        self.ledger = Ledger()
        self.ledger.load_state_dict(saved["ledger"])
        if self.epochs.finished:  # what remained was too little for the ranks there are now
            self.epochs.end(None)


@final
class _Dealt:
    """What the trainer takes for its loader; its length is that of an epoch of all samples."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self.dataset = attached._source.dataset

    def __len__(self) -> int:
        epochs = self._attached.epochs
        return epochs.geometry.micro_batches(epochs.size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        attached = self._attached
        for batch, context in attached.epochs.batches(**attached._reading()):
            yield {**attached._mapping(batch), CONTEXT: context}


@final
class _Callback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, attached: Attached) -> None:
        self._attached = attached

    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self._attached.stepped()

    def on_save(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self._attached.save(
            Path(args.output_dir) / f"checkpoint-{state.global_step}" / hf_state.DIRECTORY
        )
