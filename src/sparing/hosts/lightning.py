"""Methods in Lightning: one callback, and one line in ``training_step``::

    methods = sparing.LightningMethods([sparing.TopAny(max_experts=8)])

    class Classifier(L.LightningModule):
        def training_step(self, batch, batch_idx):
            x, y = batch
            losses = F.cross_entropy(self.model(x), y, reduction="none")  # one for each sample
            return methods.loss(losses)

    L.Trainer(callbacks=[methods], max_epochs=10).fit(Classifier(), train_loader)

The loader stays a plain ``DataLoader``: its data set, collate function and workers are used, its
batches are dealt by the methods' plans, each with its samples' identity, and each rank gets its
share. Lightning therefore has no sampler to wrap for ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from sparing.core import ranks
from sparing.core.errors import RequestError
from sparing.core.method import Context, Method, Setup, arrange, combine, implements
from sparing.core.sparse_gradients import any_sparse, clip_norm_
from sparing.core.tree import encode
from sparing.hosts import hooks, lightning_requests, loading
from sparing.hosts.dry_run import rehearse
from sparing.hosts.epochs import Epochs, Geometry
from sparing.hosts.following import Following
from sparing.hosts.groups import regroup_
from sparing.hosts.host import Host
from sparing.hosts.lightning_trying import TRIED, loss_of, tried_by

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'methods in Lightning need "{error.name}": pip install "sparing[lightning]"',
        name=error.name,
    ) from error


@final
class _Carried:
    """A context on its way through Lightning, which looks into containers and leaves this alone."""

    def __init__(self, context: Context) -> None:
        self.context = context


@final
class LightningMethods(Callback, Host):  # type: ignore[misc]
    """Binds methods to ``lightning.pytorch.Trainer.fit``; see the module's text.

    Args:
        methods: constructed methods; their order and conflicts are checked here.
        seed: of the order of samples where no method plans, and for the methods.
        dry_run: try one batch through ``training_step`` and every seam, on copies, before any
            compute is spent.

    After ``fit``, ``clock``, ``account()`` and ``signals()`` tell what happened.
    Raises RequestError, when fitting starts, for what cannot work.
    """

    def __init__(self, methods: Iterable[Method], *, seed: int = 0, dry_run: bool = True) -> None:
        hooks.check(hooks.LIGHTNING, "lightning")
        self._start(arrange(methods))
        self.seed = seed
        self.epochs: Epochs | None = None
        self._try_first = dry_run
        self._plans = any(implements(method, "order") for method in self.methods)
        self._loader: Any = None
        self._moving: Context | None = None
        self._context: Context | None = None
        self._lost = False
        self._ran = 0  # micro-batches of this epoch as Lightning counts them
        self._steps, self._begun = 0, False
        self._evaluating = ExitStack()

    # ---- the one line -------------------------------------------------------------------------

    def loss(self, losses: Tensor, outputs: Any = None) -> Tensor:
        """The scalar to return from ``training_step``, of one loss for each sample, (B,).

        Raises RequestError for losses that are reduced, and outside of training.
        """
        tried = TRIED.get()
        if tried is not None:
            tried.append((losses, outputs))
            return losses.mean()
        context, epochs = self._context, self.epochs
        if context is None or epochs is None or self._lost:
            raise RequestError(
                "loss() belongs into training_step, once for each batch, of a trainer that has "
                "this callback: Trainer(callbacks=[methods]); in validation_step use losses.mean()"
            )
        if losses.shape != context.index.shape[:1]:
            raise RequestError(
                f"loss() takes one loss for each of the {context.index.shape[0]} samples of the "
                f"batch, got shape {tuple(losses.shape)}; reduce over everything but the batch "
                '(reduction="none")'
            )
        self._lost = True
        # Lightning divides by accumulate_grad_batches, in a shorter last group too
        whole = epochs.geometry.accumulate / epochs.parts()
        loss = combine(self.methods, losses, context, outputs)
        return loss if whole == 1 else loss * whole

    # ---- before training ----------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stand between the trainer and its loader, and before its optimizer."""
        if stage != "fit":
            return
        lightning_requests.check(trainer, pl_module, self.methods)
        if self.clock.step:
            raise RequestError(
                "this callback has trained already, and its methods stand where that ended; give "
                "the trainer a new one, with new methods"
            )
        source = trainer.fit_loop._data_source
        plain_loader, configure, optimizers = (
            source.dataloader,
            pl_module.configure_model,
            pl_module.configure_optimizers,
        )
        call_hook = pl_module._call_batch_hook
        precision = trainer.precision_plugin
        clip = precision.clip_grad_by_norm

        # functions, not methods: a copy of the module then copies none of what they hold
        def dataloader() -> Any:
            if trainer.fit_loop._combined_loader is not None:  # it is to be loaded again
                self._loader = lightning_requests.only(plain_loader())
            return _Dealt(self)

        def configure_model() -> None:
            configure()
            if self.epochs is None:
                self._loader = lightning_requests.only(plain_loader())
                self._bind(trainer, pl_module)

        def configure_optimizers() -> Any:
            built = optimizers()
            for optimizer in lightning_requests.optimizers(built):
                groups = len(optimizer.param_groups)
                regroup_(optimizer, lightning_requests.model_of(pl_module), self.methods)
                lightning_requests.check_schedule(built, groups, len(optimizer.param_groups))
            return built

        def clip_grad_by_norm(optimizer: Any, clip_val: float) -> None:
            parameters = list(precision.main_params(optimizer))
            if any_sparse(parameters):  # torch has no norm of sparse gradients
                clip_norm_(parameters, clip_val)
            else:
                clip(optimizer, clip_val)

        def call_batch_hook(hook_name: str, *arguments: Any) -> Any:
            batch, *others = arguments
            if hook_name == "on_before_batch_transfer":
                self._moving = None
                if type(batch) is tuple and len(batch) == 2 and isinstance(batch[1], _Carried):
                    batch, self._moving = batch[0], batch[1].context
            batch = call_hook(hook_name, batch, *others)
            if hook_name == "on_after_batch_transfer" and self._moving is not None:
                self._context, self._moving, self._lost = self._moving, None, False
                batch = self._prepared(self.methods, batch, self._context)
            return batch

        source.dataloader = dataloader
        pl_module.configure_model = configure_model
        pl_module._call_batch_hook = call_batch_hook
        precision.clip_grad_by_norm = clip_grad_by_norm
        if any(implements(method, "optimizer") for method in self.methods):
            pl_module.configure_optimizers = configure_optimizers

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Step out again."""
        if stage != "fit":
            return
        for name in ("configure_model", "_call_batch_hook", "configure_optimizers"):
            pl_module.__dict__.pop(name, None)
        trainer.fit_loop._data_source.__dict__.pop("dataloader", None)
        trainer.precision_plugin.__dict__.pop("clip_grad_by_norm", None)

    def _bind(self, trainer: Any, module: nn.Module) -> None:
        loader, limit = self._loader, trainer.limit_train_batches
        geometry = Geometry(
            batch_size=loader.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world=trainer.world_size,
            drop_last=loader.drop_last,
            limit=None if limit == 1.0 and isinstance(limit, float) else limit,
        )
        size = len(loader.dataset)
        dense = geometry.steps(geometry.micro_batches(size))
        if dense == 0:
            raise RequestError(
                f"{size} samples make no batch of {geometry.batch_size} on {geometry.world} ranks"
            )
        epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
        planned = None if epochs is None else epochs * dense
        if trainer.max_steps > 0:
            planned = trainer.max_steps if planned is None else min(planned, trainer.max_steps)
        self.clock.steps, self.clock.epochs = planned, epochs
        self.epochs = planned_epochs = Epochs(
            self.methods, size=size, geometry=geometry, order=self._sampled, clock=self.clock
        )
        device = trainer.strategy.root_device
        self._domain_of, self._domains = loading.domains_of(loader.dataset)

        def read(index: Tensor) -> Any:
            return loading.to_device(loading.read(loader.dataset, index, loader.collate_fn), device)

        setup = Setup(
            seed=self.seed,
            steps=planned,
            dtype=lightning_requests.dtype(trainer.precision),
            device=str(device),
            world_size=trainer.world_size,
            batches=lambda: planned_epochs.shuffled(by=self.seed, **self._reading(workers=0)),
            read=read,
            size=size,
            domain_of=self._domain_of,
            domains=self._domains,
            loss=lambda model, batch: loss_of(module, model, batch),
        )
        for method in self.methods:
            prepared = method.prepare(lightning_requests.model_of(module), setup)
            if not lightning_requests.replace_model_(module, prepared):
                raise RequestError(
                    f'"{method.name}" gives another module in place of the LightningModule, which '
                    "Lightning cannot take; prepare the model before it goes into the module"
                )
        bound: dict[str, Any] = {
            "size": size,
            "epochs": epochs,
            "steps": planned,
            "seed": self.seed,
        }
        if self._try_first:
            self._dry_run(trainer, module, bound, device)
        for method in self.methods:
            method.bind(
                **bound,
                model=lightning_requests.model_of(module),
                probe=lambda: self._probe_of(module, lightning_requests.model_of(module)),
            )
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        self.ledger.set_level("parameters", spent=trained)

    def _dry_run(
        self, trainer: Any, module: nn.Module, bound: dict[str, Any], device: torch.device
    ) -> None:
        assert self.epochs is not None
        epochs = self.epochs

        def first(methods: list[Method]) -> tuple[Any, Context]:
            batch, context = epochs.first(methods, **self._reading(workers=0))
            return self._prepared(methods, loading.to_device(batch, device), context), context

        def losses(model: Any, batch: Any) -> tuple[Tensor, Any]:
            model.trainer = trainer
            with trainer.precision_plugin.train_step_context():
                return tried_by(model, batch)

        rehearse(
            module,
            self.methods,
            clock=self.clock,
            bound=bound,
            first=first,
            losses=losses,
            device=device,
            part=lightning_requests.model_of,
        )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Schedules that count steps follow the plan from now on, and their state with them."""
        if not self._plans or self.epochs is None or self.clock.epochs is None:
            return
        geometry = self.epochs.geometry
        dense = geometry.steps(geometry.micro_batches(self.epochs.size))
        for config in trainer.lr_scheduler_configs:
            if config.interval != "step" or config.reduce_on_plateau or config.frequency != 1:
                continue
            if isinstance(config.scheduler, LRScheduler):
                config.scheduler = Following(
                    config.scheduler,
                    total=dense * self.clock.epochs,
                    progress=lambda: self.clock.by_epochs or (0, 1),
                )

    # ---- epochs -------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """An epoch that is resumed in its middle begins here."""
        self._steps, self._begun = trainer.global_step, True
        self._begin(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The plan is made, and the trainer told how long it is."""
        self._begin(trainer)

    def _begin(self, trainer: Any) -> None:
        assert self.epochs is not None
        self.epochs.begin(len(self._loader.dataset))
        if self._plans and self.clock.epochs is not None:
            self.clock.steps = self.epochs.bound()
        loop, length = trainer.fit_loop, len(self)
        old = loop.epoch_loop.batch_progress.current.ready
        # saved at an epoch's end: Lightning looks by its count of batches whether that was the end,
        # and is told the length of this epoch when its first batch comes
        at_end = loop.epoch_loop.restarting and not self._ran and old
        self._tell(trainer, old if at_end else length)
        loop._combined_loader.limits = [length]
        iter(loop._data_fetcher)  # it asks for the length, and reads nothing yet

    def _tell(self, trainer: Any, length: int) -> None:
        """The trainer took the first epoch's length for that of all."""
        trainer.fit_loop.max_batches = length
        if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch is not None:
            trainer.val_check_batch = max(1, int(length * trainer.val_check_interval))

    def __len__(self) -> int:
        """Micro-batches of this epoch, as the trainer counts them; of all samples before training.

        ``estimated_stepping_batches`` is then what schedules are to be built for, resumed or not.
        """
        epochs = self.epochs
        assert epochs is not None
        if epochs.plan is None or not self._begun:
            return epochs.geometry.micro_batches(epochs.size)
        return self._ran + epochs.remaining

    def _sampled(self, epoch: int) -> Tensor:
        """The order of samples where no method plans: as the loader was asked to give them."""
        assert self.epochs is not None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return lightning_requests.order(self._loader, epoch, generator)

    def _reading(self, workers: int | None = None) -> dict[str, Any]:
        return loading.reading(
            self._loader,
            workers=workers,
            seed=self.seed * 1_000_003 + self.clock.epoch,
            pin_memory=self._loader.pin_memory,
        )

    # ---- a micro-batch and a step -------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what is about to be spent."""
        self._tell(trainer, len(self))
        assert self._context is not None
        self._count(pl_module, batch, self._context)

    def _mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return tried_by(model, batch)[0].mean()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Note the position in the plan, which the schedule of the rate is about to ask for."""
        if not self._lost and any(implements(method, "loss") for method in self.methods):
            raise RequestError(
                "training_step must return methods.loss(losses, outputs), so that the methods see "
                "the loss of each sample"
            )
        assert self.epochs is not None
        self.epochs.done += 1
        self.epochs.tell()
        self._ran += 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients are reduced and unscaled here, and not clipped yet."""
        for method in self.methods:
            if implements(method, "grads"):
                model = lightning_requests.model_of(pl_module)
                method.grads(model.named_parameters(), self._context)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step seam where the optimizer stepped, and the end of the epoch after its last."""
        epochs, optimizer = self.epochs, trainer.optimizers[0]
        assert epochs is not None
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._step(optimizer)
        self._context = None
        if epochs.finished:
            epochs.end(optimizer)
            self._ran = 0

    # ---- beside training ----------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """The model stands as it should be evaluated, until the end."""
        if self.epochs is not None:
            for method in self.methods:
                model = lightning_requests.model_of(pl_module)
                self._evaluating.enter_context(method.evaluating(model))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """And as it trains again."""
        self._evaluating.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @property
    def _current(self) -> Epochs:
        assert self.epochs is not None
        return self.epochs

    # ---- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint: plain data and tensors, which weights_only loading takes."""
        if self.epochs is None:
            return {}
        found = {**self._state(self.account()), "ran": self._ran}
        try:
            encode(found["recent"])
        except RequestError:  # batches of a kind that no state holds
            found["recent"] = []
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises RequestError if the state is of other methods or other data."""
        if not state_dict or self.epochs is None:
            return
        self._continue(state_dict)
        if ranks.rank() == 0:  # it holds the account of all
            self.ledger.load_state_dict(state_dict["ledger"])
        self._ran = state_dict["ran"]
        if self.epochs.finished:  # what remained was too little for the ranks there are now
            self.epochs.end(None)
            self._ran = 0


@final
class _Dealt:
    """The loader that Lightning gets: none of torch's, so that it wraps no sampler in it."""

    def __init__(self, methods: LightningMethods) -> None:
        self._methods = methods

    def __len__(self) -> int:
        return len(self._methods)

    def __iter__(self) -> Iterator[tuple[Any, _Carried]]:
        methods = self._methods
        assert methods.epochs is not None
        for batch, context in methods.epochs.batches(**methods._reading()):
            yield batch, _Carried(context)
