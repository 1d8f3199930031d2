"""The one abstraction: a method answers *which?* before a training step spends.

The loop, with the seams in the order in which a host calls them::

    model = method.prepare(model, setup)            # once, before the optimizer exists
    groups = method.optimizer(model, groups)        # when the optimizer is built
    for each epoch:
        plan = method.order(clock)                  # which samples, with which weight
        for each micro-batch of the plan:
            batch = method.batch(batch, context)    # before forward
            loss = method.loss(losses, context, outputs)
            (backward; unscale; reduce over ranks)
        method.grads(named_parameters, context)     # before any global clipping
        (optimizer step)
        method.step(clock, optimizer)               # and once more at the end of the epoch
        if method.replans(clock):                   # a tick: what is not yet dealt is planned anew
            plan = method.order(clock)
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor, nn

from sparing.core.checks import require_known
from sparing.core.clock import Clock
from sparing.core.errors import RequestError

if TYPE_CHECKING:
    from sparing.core.ledger import Ledger

Batch = Any
ParamGroups = list[dict[str, Any]]
Signal = float | int | list[float] | list[int]


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """Which samples an epoch (or a tick) takes, and with which weight. Frozen once made.

    ``index``: (n,) or (n, 2) for pairs, int64, or int32 where memory counts (a context's index is
    int64 in any case); ``weight``: float32, (n,), or None for all ones.
    """

    index: Tensor
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.dtype not in (torch.int64, torch.int32) or self.index.ndim not in (1, 2):
            raise RequestError(
                "a plan's index must be int64 or int32 of shape (n,) or (n, 2), got "
                f"{self.index.dtype} of shape {tuple(self.index.shape)}"
            )
        if self.index.ndim == 2 and self.index.shape[1] != 2:
            raise RequestError(f"a plan of pairs has shape (n, 2), got {tuple(self.index.shape)}")
        if self.weight is not None and self.weight.shape != self.index.shape[:1]:
            raise RequestError(
                f"a plan's weight must have shape {tuple(self.index.shape[:1])}, "
                f"got {tuple(self.weight.shape)}"
            )

    def __len__(self) -> int:
        return int(self.index.shape[0])


@final
@dataclass(slots=True)
class Context:
    """What is known about one micro-batch; the host carries it, so identity travels with the data.

    ``index``: (B, k) int64, the k samples that made each row (k is 1 without mixing).
    ``share``: (B, k) float32, how much of the row each of them is; rows sum to 1.
    ``weight``: (B,) float32, the plan's weights. ``mask``: (B, S) bool, True where a token is real.
    ``domain``: (B,) int64, an index into the task's domains. ``extra`` is for what methods add.
    """

    index: Tensor
    share: Tensor
    weight: Tensor | None = None
    mask: Tensor | None = None
    domain: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(index: Tensor, **known: Any) -> Context:
        """The context of unmixed samples ``index``: (B,)."""
        return Context(
            index=index.long().reshape(-1, 1), share=torch.ones(index.numel(), 1), **known
        )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What ``prepare`` is told about the run before anything is built.

    ``batches()`` iterates over batches of the training data in a fixed order, without advancing
    any generator, and ``loss(model, batch)`` is their mean loss, a scalar: for methods that must
    look at the loss before there is an optimizer. None where the host knows no data or no loss.
    ``read(index)`` gives the training samples ``index``, (B,) int64, as one batch, on the device,
    as they are before augmentation where the data set can tell (``plain``); there are ``size``.
    ``domain_of(index)`` tells their positions in ``domains``, None where none are known.
    """

    seed: int = 0
    steps: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    world_size: int = 1
    batches: Callable[[], Iterable[Batch]] | None = None
    read: Callable[[Tensor], Batch] | None = None
    size: int | None = None
    domain_of: Callable[[Tensor], Tensor] | None = None
    domains: tuple[str, ...] = ()
    loss: Callable[[nn.Module, Batch], Tensor] | None = None


class Method(abc.ABC):
    """A decision about what training spends. Final subclasses implement only the seams they need.

    A subclass sets ``name`` (its name in the registry) and ``Options`` (a frozen, keyword-only
    dataclass) and is constructed from the options' keywords: ``InfoBatch(ratio=0.5)``.

    ``loss_stage`` fixes the order inside the ``loss`` seam: methods of stage ``"sample"`` add
    terms to the losses per sample, (B,) to (B,); then those of stage ``"weight"`` multiply
    selection weights, (B,) to (B,); then the host takes the mean; then those of stage ``"batch"``
    add terms that have no sample, scalar to scalar.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]]
    loss_stage: ClassVar[Literal["sample", "weight", "batch"]] = "sample"
    after: ClassVar[tuple[str, ...]] = ()
    """Names of methods whose seams run before this one's when both are attached."""
    conflicts: ClassVar[Mapping[str, str]] = {}
    """Names of methods that cannot be attached beside this one, each with the reason."""
    freezes: ClassVar[bool] = False
    """Whether it trains a few values beside a frozen model. Dense training is then that of the
    whole model, which hosts enter into the ledger as the FLOPs that would have been spent."""

    def __init__(self, **options: Any) -> None:
        require_known(type(self).__name__, options, self.Options)
        self.options: Any = self.Options(**options)

    def __repr__(self) -> str:
        default = type(self).Options()
        changed = {
            key: value
            for key, value in self.to_dict().items()
            if value != getattr(default, key, object())
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data, which ``from_dict`` (and a recipe's YAML) takes back."""
        return asdict(self.options)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        return cls(**dict(options))

    @classmethod
    def at_random(
        cls, options: Mapping[str, Any], signals: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]] | None:
        """The methods that spend the same with nothing chosen: {name in the registry: options}.

        ``options`` are this method's, resolved, ``signals`` what it reported at the end of a run.
        A comparison generates an arm from it, so that a choice is measured against chance at the
        same cost. None if this method chooses nothing that chance could choose instead.
        """
        return None

    # ---- what attaching tells the method; direct users pass the same by keyword -------------

    def bind(
        self,
        *,
        size: int | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        model: nn.Module | None = None,
        probe: Callable[[], Tensor] | None = None,
    ) -> None:
        """Tell the method what the loop knows.

        ``size`` of the training set, planned ``epochs`` and optimizer ``steps``, the ``seed`` of
        the run, the prepared ``model``; ``probe()`` returns the mean loss, a scalar, over a few
        recent training batches without gradient and in evaluation mode.
        """

    # ---- the seams ---------------------------------------------------------------------------

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Change the model before the optimizer exists."""
        return model

    def optimizer(self, model: nn.Module, groups: ParamGroups) -> ParamGroups:
        """Change the groups ``{"params": [(name, parameter), ...]}`` of the optimizer to build."""
        return groups

    def order(self, clock: Clock) -> Plan | None:
        """The samples of the epoch that begins; None leaves the choice to others."""
        return None

    def replans(self, clock: Clock) -> bool:
        """Whether now is a tick: then ``order`` is asked again, after an optimizer step.

        The plan that it gives is as long as the one before and begins with the ``clock.dealt``
        places that loaders already have. All ranks must answer alike.
        """
        return False

    def batch(self, batch: Batch, context: Context) -> Batch:
        """Change a micro-batch before forward."""
        return batch

    def loss(self, losses: Tensor, context: Context, outputs: Any) -> Tensor:
        """Change the losses; shapes as ``loss_stage`` says."""
        return losses

    def grads(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], context: Context | None
    ) -> None:
        """Change gradients in place, after unscaling and reduction, before global clipping."""

    def step(self, clock: Clock, optimizer: torch.optim.Optimizer | None) -> None:
        """After each optimizer step, and once with ``clock.epoch_ended`` at the end of an epoch."""

    # ---- optional seams ----------------------------------------------------------------------

    def streams(self) -> dict[str, Any]:
        """Loaders of further data streams that this method needs beside the training data."""
        return {}

    def evaluating(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the model stands as it should be evaluated."""
        return nullcontext()

    # ---- state, account ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue bit for bit: scores, plans, clocks, generators."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""

    def signals(self) -> dict[str, Signal]:
        """Numbers worth logging now."""
        return {}

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since the last call and a reader of the log should know, in order."""
        return []

    def touches(self) -> list[str]:
        """What ``prepare`` changed and the options decide, in a few lines for ``sparing plan``."""
        return []

    def estimate(self, tokens: int) -> tuple[int, int]:
        """(spent, dense) FLOPs of training on that many tokens, beyond what the host counts."""
        return 0, 0

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the trained model to the directory ``path``, as ``imported`` reads it."""

    @classmethod
    def imported(cls, path: Path, base: Callable[[], nn.Module]) -> nn.Module:
        """The model that ``export`` wrote to ``path``; ``base()`` is the one before ``prepare``.

        Raises RequestError for what ``export`` did not write, RunError for what is damaged.
        """
        raise RequestError(f'"{cls.name}" has no reader for {path}; its card tells what reads it')

    def page(
        self, model: nn.Module, passages: list[dict[str, Any]], read: Callable[[Any], Any]
    ) -> dict[str, Any]:
        """What the report page shows of this method, as JSON-able data by key.

        ``passages`` are the task's, ``read(passage)`` runs the model over one. The key
        ``selection`` is for methods that choose samples: {size, lengths, by_difficulty, histogram,
        never_dropped, groups: [{title, index}]}; the task shows the samples of the groups.
        """
        return {}

    def account(self, ledger: Ledger) -> None:
        """Enter what was spent since the last call, and what dense training would have spent."""


def implements(method: Method, seam: str) -> bool:
    """Whether the method overrides the seam."""
    return getattr(type(method), seam) is not getattr(Method, seam)


def arrange(methods: Iterable[Method]) -> list[Method]:
    """Put methods in the order in which their seams run.

    Raises RequestError for two of one name, for declared conflicts and for circular orders.
    """
    given = list(methods)
    names = [m.name for m in given]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f'method "{name}" is attached twice; attach each method once')
    for method in given:
        for other, reason in method.conflicts.items():
            if other in names:
                raise RequestError(f'"{method.name}" cannot work beside "{other}": {reason}')
    placed: list[Method] = []
    waiting = given
    while waiting:
        ready = [m for m in waiting if not any(w.name in m.after for w in waiting if w is not m)]
        if not ready:
            circle = ", ".join(m.name for m in waiting)
            raise RequestError(f"the declared orders of these methods form a circle: {circle}")
        placed.append(ready[0])
        waiting = [m for m in waiting if m is not ready[0]]
    return placed


def combine(methods: Iterable[Method], losses: Tensor, context: Context, outputs: Any) -> Tensor:
    """Run the loss seams in their fixed order; losses: (B,) to a scalar."""
    known = list(methods)
    if losses.ndim != 1:
        raise RequestError(
            f"losses must have one value for each sample, shape (B,), got {tuple(losses.shape)}"
        )
    for stage in ("sample", "weight"):
        for method in known:
            if method.loss_stage == stage:
                losses = method.loss(losses, context, outputs)
    loss = losses.mean()
    for method in known:
        if method.loss_stage == "batch":
            loss = method.loss(loss, context, outputs)
    return loss
