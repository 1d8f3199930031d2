"""Methods in a plain training loop, on Accelerate: one CPU, one GPU, DDP, FSDP.

The session binds the methods' seams to the loop and owns nothing else; the loop stays yours::

    session = sparing.Session(
        model, [sparing.TopAny(max_experts=8)], data=train_set, batch_size=32, epochs=3,
        optimizer=partial(torch.optim.AdamW, lr=3e-4),
    )
    for batch, context in session:
        outputs = session.model(batch["x"])
        losses = F.cross_entropy(outputs, batch["y"], reduction="none")  # one for each sample
        session.step(losses, context, outputs)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from sparing.core import ranks
from sparing.core.checks import require_whole
from sparing.core.clock import Clock
from sparing.core.errors import DivergedError, RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Context, Method, Plan, Setup, arrange, combine, implements
from sparing.core.padding import real_tokens
from sparing.core.sparse_gradients import check_optimizer, clip_norm_
from sparing.hosts import loading
from sparing.hosts.dry_run import rehearse
from sparing.hosts.epochs import Epochs, Geometry
from sparing.hosts.host import PROBE_BATCHES, PROBE_ROWS, Bound
from sparing.hosts.per_sample import Losses
from sparing.hosts.session_state import restore_, state_of
from sparing.hosts.static_flops import StaticFlops

if TYPE_CHECKING:
    from accelerate import Accelerator


@final
class Session(Bound):
    """Binds methods to a plain loop.

    Args:
        model: changed in place by methods that prepare it; use ``session.model`` afterwards.
        methods: constructed methods; their order and conflicts are checked here.
        data: a map-style data set, or anything with ``batch(index)`` and a length; if it has
            ``set_epoch(epoch)``, that is called before each epoch, also after a resume.
        optimizer: builds it from groups of named parameters: ``partial(AdamW, lr=1e-3)``.
        losses: ``losses(model, batch) -> ((B,) losses, outputs)``. Optional: with it the session
            tries one batch through every seam before any compute is spent, counts the FLOPs of
            the model's dense part, and can show methods the loss of recent batches.
        batch_size: samples of one micro-batch of one rank; ``accumulate`` of them make a step.
        epochs, steps: when to stop, whichever comes first; at least one of them.
        schedule: factor of the learning rate as a function of the share of training done, [0, 1]:
            of the steps, or (epoch + share of its plan) / epochs where methods leave samples out.
        clip: largest global gradient norm, after the methods' ``grads`` seam.
        order: ``order(epoch, generator) -> (n,)`` where no method plans; default a permutation.
        domain_of, domains: the domain of samples by index, and the domains' names; default those
            of ``data``, where it has both.
        precision: "fp32" or "bf16" (autocast; weights and optimizer stay in fp32).

    Raises RequestError for what cannot work, before anything is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Iterable[Method] = (),
        *,
        data: Any,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        losses: Losses | None = None,
        batch_size: int = 1,
        accumulate: int = 1,
        epochs: int | None = None,
        steps: int | None = None,
        schedule: Callable[[float], float] | None = None,
        clip: float | None = None,
        order: Callable[[int, torch.Generator], Tensor] | None = None,
        domain_of: Callable[[Tensor], Tensor] | None = None,
        domains: tuple[str, ...] = (),
        collate: Callable[[list[Any]], Any] = default_collate,
        workers: int = 0,
        seed: int = 0,
        precision: str = "fp32",
        accelerator: Accelerator | None = None,
        dry_run: bool = True,
    ) -> None:
        _check(batch_size=batch_size, accumulate=accumulate, epochs=epochs, steps=steps)
        if epochs is None and steps is None:
            raise RequestError("a session needs an end: give epochs, steps, or both")
        if precision not in ("fp32", "bf16"):
            raise RequestError(f'precision must be "fp32" or "bf16", got "{precision}"')
        if accelerator is None:
            from accelerate import Accelerator

            accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.accelerator = accelerator
        self.methods = arrange(methods)
        self.data, self.batch_size, self.accumulate = data, batch_size, accumulate
        self.seed, self.precision, self.clip = seed, precision, clip
        if domain_of is None:
            domain_of, domains = loading.domains_of(data)
        self.domains = domains
        self.ledger = Ledger()
        self._losses, self._order, self._domain_of = losses, order, domain_of
        self._schedule, self._collate, self._workers = schedule, collate, workers
        self._recent: deque[Any] = deque(maxlen=PROBE_BATCHES)
        self._static = StaticFlops(self.methods)
        self._limit = steps
        if len(data) == 0:
            raise RequestError("the data set is empty: there is nothing to train on")
        self.clock = Clock(steps=steps, epochs=epochs)
        self.epochs = Epochs(
            self.methods,
            size=len(data),
            geometry=Geometry(
                batch_size=batch_size, accumulate=accumulate, world=int(accelerator.num_processes)
            ),
            order=self._default_order,
            clock=self.clock,
            dense=len(data) if order is None else len(self._default_order(0, len(data))),
        )
        planned = self.clock.steps = self._planned_steps()

        setup = Setup(
            seed=seed,
            steps=planned,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            device=str(accelerator.device),
            world_size=accelerator.num_processes,
            batches=None if losses is None else self._shuffled,
            read=self._read,
            size=len(data),
            domain_of=domain_of,
            domains=self.domains,
            loss=None if losses is None else lambda model, batch: losses(model, batch)[0].mean(),
        )
        for method in self.methods:
            model = method.prepare(model, setup)
        groups: list[dict[str, Any]] = [
            {"params": [(n, p) for n, p in model.named_parameters() if p.requires_grad]}
        ]
        for method in self.methods:
            groups = method.optimizer(model, groups)
        if dry_run and losses is not None:
            self._dry_run(model)
        built = optimizer(groups)
        check_optimizer(model, built)
        self.model, self.optimizer = accelerator.prepare(model, built)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        for method in self.methods:
            method.bind(
                size=self.epochs.size,
                epochs=epochs,
                steps=planned,
                seed=seed,
                model=self.unwrapped,
                probe=self._probe if losses is not None else None,
            )
        trained = sum(p.numel() for p in self.unwrapped.parameters() if p.requires_grad)
        self.ledger.set_level("parameters", spent=trained)

    # ---- the loop ----------------------------------------------------------------------------

    @property
    def unwrapped(self) -> nn.Module:
        """The model without the wrappers of DDP and the like."""
        plain: nn.Module = self.accelerator.unwrap_model(self.model)
        return plain

    @property
    def finished(self) -> bool:
        """Whether the planned steps or epochs are done."""
        by_steps = self._limit is not None and self.clock.step >= self._limit
        by_epochs = self.clock.epochs is not None and self.clock.epoch >= self.clock.epochs
        return by_steps or by_epochs

    def __iter__(self) -> Iterator[tuple[Any, Context]]:
        """Micro-batches with their contexts until the planned end; resumes where it stood."""
        while not self.finished:
            self.epochs.begin(len(self.data))
            if callable(tell := getattr(self.data, "set_epoch", None)):
                tell(self.clock.epoch)  # what it draws at random is another in each epoch
            self.clock.steps = self._planned_steps()
            plan = self.epochs.plan
            source = self.epochs.batches(
                self.data,
                collate=self._collate,
                workers=self._workers,
                seed=self.seed * 1_000_003 + self.clock.epoch,
            )
            for batch, context in source:
                yield self._begin(batch, context)
                if self.finished:
                    return
            if self.epochs.plan is plan:  # batches that the loop passed over: the epoch is over
                self.epochs.end(self._torch_optimizer)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of this session, for a forward pass of your own."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    def forward(self, batch: Any) -> tuple[Tensor, Any]:
        """Losses, (B,), and outputs of a batch by the session's ``losses``."""
        if self._losses is None:
            raise RequestError(
                "this session was given no losses(model, batch); compute them yourself"
            )
        with self.autocast():
            return self._losses(self.model, batch)

    def loss(self, losses: Tensor, context: Context, outputs: Any = None) -> Tensor:
        """The scalar to train on: terms per sample, then weights, then the mean, then the rest."""
        return combine(self.methods, losses, context, outputs)

    def step(self, losses: Tensor, context: Context, outputs: Any = None) -> float:
        """Backward, and at the end of an accumulation the optimizer step and all that follows.

        ``losses``: (B,), one for each sample. Returns their unweighted mean on this rank. Raises
        DivergedError if it is not finite, nor what the methods make of it, nor the norm of
        gradients that are to be clipped; the optimizer has not been touched then.
        """
        mean = float(losses.detach().mean())
        if not math.isfinite(mean):
            raise DivergedError(self._diagnosis("the loss", losses, context))
        loss = self.loss(losses, context, outputs)
        if not math.isfinite(float(loss.detach())):
            raise DivergedError(
                self._diagnosis("the loss with the methods' terms", losses, context)
            )
        if self.epochs.plan is None:
            raise RequestError("step() belongs inside the loop: for batch, context in session: ...")
        parts = self.epochs.parts()
        self.accelerator.backward(loss / parts)
        self.epochs.done += 1
        if self.epochs.done % self.accumulate == 0 or self.epochs.finished:
            self._optimizer_step(losses, context)
        if self.epochs.finished:
            self.epochs.end(self._torch_optimizer)
        return mean

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The unwrapped model as it should be evaluated, in evaluation mode, without gradient."""
        model = self.unwrapped
        training = model.training
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.evaluating(model))
            model.eval()
            try:
                with torch.no_grad(), self.autocast():
                    yield model
            finally:
                model.train(training)

    # ---- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that continues this session bit for bit: load it into one built the same way.

        Raises RequestError within an accumulation: gradients and what methods noted of the step
        that is under way belong to no state.
        """
        pending = self.epochs.done % self.accumulate
        if pending:
            raise RequestError(
                f"state_dict() belongs between optimizer steps; {pending} of {self.accumulate} "
                "micro-batches are accumulated now: call it when clock.step has moved"
            )
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RequestError if the state is of other methods."""
        restore_(self, state)

    # ---- inside ------------------------------------------------------------------------------

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(inner, torch.optim.Optimizer)
        return inner

    def _planned_steps(self) -> int:
        """The limit, or what the epochs come to if every later one leaves nothing out."""
        if self.clock.epochs is None:
            assert self._limit is not None
            return self._limit
        bound = self.epochs.bound()
        return bound if self._limit is None else min(self._limit, bound)

    def _default_order(self, epoch: int, size: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self._order is not None:
            return self._order(epoch, generator)
        return torch.randperm(self.epochs.size if size is None else size, generator=generator)

    def _begin(self, batch: Any, context: Context) -> tuple[Any, Context]:
        batch = self._prepared(self.methods, batch, context)
        self._count(batch, context)
        self._recent.append(batch)
        self.model.train()
        return batch, context

    def _prepared(self, methods: list[Method], batch: Any, context: Context) -> Any:
        batch = loading.to_device(batch, self.accelerator.device)
        mask = real_tokens(batch.get("attention_mask") if isinstance(batch, Mapping) else None)
        if mask is not None:
            context.mask = mask
        if self._domain_of is not None and context.index.shape[1] == 1:
            context.domain = self._domain_of(context.index[:, 0])
            context.extra["domains"] = self.domains
        for method in methods:
            batch = method.batch(batch, context)
        return batch

    def _count(self, batch: Any, context: Context) -> None:
        samples, tokens = context.index.shape[0], loading.token_count(batch, context)
        self.ledger.add("samples", spent=samples)
        self.ledger.add("tokens", spent=tokens)
        if self._losses is not None:
            self.ledger.add("flops", **self._static.of(self.unwrapped, batch, self._mean_loss))
        everyone = torch.tensor([samples, tokens], dtype=torch.int64)
        ranks.sum_([everyone])
        self.clock.samples += int(everyone[0])
        self.clock.tokens += int(everyone[1])

    def _mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        assert self._losses is not None
        return self._losses(model, batch)[0].mean()

    def _optimizer_step(self, losses: Tensor, context: Context) -> None:
        optimizer = self._torch_optimizer
        self.accelerator.unscale_gradients(self.optimizer)
        for method in self.methods:
            if implements(method, "grads"):
                method.grads(self.unwrapped.named_parameters(), context)
        if self.clip is not None:
            norm = clip_norm_(self.unwrapped.parameters(), self.clip)
            if not math.isfinite(float(norm)):  # a step with it would make every weight NaN
                raise DivergedError(self._diagnosis("the gradient", losses, context))
        if self._schedule is not None:
            factor = self._schedule(self.clock.fraction)
            for group in optimizer.param_groups:
                group["lr"] = group.get("fixed_lr", group["initial_lr"] * factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.step += 1
        self.epochs.tell()
        for method in self.methods:
            method.step(self.clock, optimizer)
            method.account(self.ledger)
        self.epochs.replan()

    def _probe(self) -> Tensor:
        """Mean loss over a few rows of the latest batches, the same number on every rank."""
        assert self._losses is not None
        found = []
        with self.evaluating() as model:
            for batch in self._recent:
                rows = loading.rows(batch)
                part = loading.first_rows(batch, min(rows, PROBE_ROWS), rows)
                found.append(self._losses(model, part)[0].float().mean())
        mean = torch.stack(found).mean()
        ranks.mean_([mean])
        return mean

    def _shuffled(self) -> Iterator[Any]:
        return self.epochs.shuffled(self.data, by=self.seed, collate=self._collate, seed=self.seed)

    def _read(self, index: Tensor) -> Any:
        batch = loading.read(self.data, index, self._collate)
        return loading.to_device(batch, self.accelerator.device)

    def _dry_run(self, model: nn.Module) -> None:
        def first(methods: list[Method]) -> tuple[Any, Context]:
            plan = self.epochs.plan_of(methods, self.epochs.copy_clock())
            weight, some = plan.weight, slice(0, self.batch_size)
            rows = Plan(plan.index[some], None if weight is None else weight[some])
            batch, context = next(
                loading.batches(self.data, rows, batch_size=self.batch_size, collate=self._collate)
            )
            return self._prepared(methods, batch, context), context

        def losses(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
            assert self._losses is not None
            with self.autocast():
                return self._losses(model, batch)

        rehearse(
            model,
            self.methods,
            clock=self.clock,
            bound={
                "size": self.epochs.size,
                "epochs": self.clock.epochs,
                "steps": self.clock.steps,
                "seed": self.seed,
            },
            first=first,
            losses=losses,
            device=self.accelerator.device,
        )

    def _diagnosis(self, what: str, losses: Tensor, context: Context) -> str:
        whose = loading.whose(~torch.isfinite(losses.detach()), context, self.domains)
        return (
            f"{what} is not finite at step {self.clock.step + 1} ({whose}); the optimizer was "
            "not stepped. Lower the learning rate, or look at these samples"
        )


def _check(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None:
            require_whole(name, value, 1)
