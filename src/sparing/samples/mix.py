"""Mixing: from which source the next samples come, by weights that may move while training.

One object is at once a ``Method`` for a host and a torch ``Sampler`` for a plain loop::

    data = sparing.Sources({"code": code, "maths": maths, "chat": "chat.jsonl"})
    sampler = sparing.Mix(rule="temperature", temperature=3, sources=data)
    for index, x, y in DataLoader(sparing.indexed(data), sampler=sampler, batch_size=32):
        losses = F.cross_entropy(model(x), y, reduction="none")
        sampler.loss(losses, index).backward()
        ...
        sampler.tick()      # after each optimizer step, for rules whose weights move
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from sparing.core import ranks
from sparing.core.checks import require_whole
from sparing.core.clock import Clock
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.loads import tells_loads
from sparing.core.method import Context, Method, Plan, Setup, Signal
from sparing.core.select import rounded
from sparing.samples.mixing_history import MixHistory
from sparing.samples.mixing_losses import SourceLosses
from sparing.samples.mixing_options import MixOptions
from sparing.samples.mixing_plan import Drawn, Ids, Members, mixed, tensor
from sparing.samples.mixing_saved import MixState
from sparing.samples.mixing_start import by_name, first
from sparing.samples.mixing_update import updated

Measure = Callable[[nn.Module | None], Mapping[str, Any]]


@final
class Mix(Method, Sampler[int]):
    """Draws samples from weighted sources; the weights may move at stated ticks.

    Args:
        sources: the data set, with ``domains`` and ``domain_of`` (``sparing.Sources`` has both);
            or the source of each sample, (N,) int64. A host tells it by ``prepare``.
        names: of the sources, with a tensor; default "0", "1", ...
        seed: of plans and looks; ranks need the same one.
        shard: give each rank its share of every plan, for a plain DataLoader under torchrun.
        measure: ``measure(model) -> {"loads": (D, E) or a list of them by layer, "losses": (D,)}``
            (either or both) in place of this library's own look at the sources, for experts that
            it does not know; the same on every rank.
        options: those of ``MixOptions``, by keyword.

    A plan is an epoch long; at a tick the part of it that no loader has yet is made anew.
    Raises RequestError for options that do not fit the sources, before anything is trained.
    """

    name: ClassVar[str] = "mix"
    Options = MixOptions
    identity: ClassVar[Mapping[str, Any]] = {"rule": "none"}

    def __init__(
        self,
        *,
        sources: Any = None,
        names: Sequence[str] | None = None,
        seed: int = 0,
        shard: bool = False,
        measure: Measure | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.shard, self.measure = shard, measure
        self.names: tuple[str, ...] = ()
        self.seed = seed
        self.model: nn.Module | None = None
        self.setup: Setup | None = None
        self._whole: Members | None = None
        self._losses: SourceLosses | None = None
        self._loaded: dict[str, Any] | None = None
        self._epoch, self.ticks, self._steps = 0, 0, 0
        self._plan: Ids | None = None
        self._dealt = self._reported = self._start = 0
        self._due = self._exhausted = False
        self.seen = self._paid = 0
        self._history = MixHistory()
        self._own_sources = sources is not None
        if sources is not None:
            self._own(sources, names)

    @classmethod
    def at_random(
        cls, options: Mapping[str, Any], signals: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]] | None:
        """Weights drawn anew at as many ticks; of fixed ones, a uniform mixture."""
        method = cls(**options)
        kept = {"share": method.options.share, "every": method.options.every}
        if method.options.rule in ("none", "size", "uniform", "random"):
            return None
        return {"mix": {"rule": "random" if method.options.moves else "uniform", **kept}}

    # ---- the sources -------------------------------------------------------------------------

    def _own(self, sources: Any, names: Sequence[str] | None = None) -> None:
        if isinstance(sources, Tensor):
            count = int(sources.max()) + 1 if names is None and sources.numel() else 0
            told = [str(i) for i in range(count)] if names is None else list(names)
            self._tell(sources, told)
            return
        domain_of, domains = getattr(sources, "domain_of", None), getattr(sources, "domains", None)
        if not callable(domain_of) or domains is None:
            raise RequestError(
                f"{type(sources).__name__} does not tell the sources of its samples; give "
                "sparing.Sources({name: data set, ...}), or the source of each sample, (N,) int64"
            )
        self._tell(domain_of(torch.arange(len(sources))), list(domains))

    def _tell(self, source_of: Tensor, names: Sequence[str]) -> None:
        if self._whole is not None and len(source_of) != self._whole.source_of.size:
            raise RequestError(
                f"the data set had {self._whole.source_of.size} samples and has {len(source_of)} "
                "now; make a new sampler for the new data"
            )
        self.names = tuple(map(str, names))
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise RequestError(f"two sources have the same name: {', '.join(twice)}")
        self._whole = Members(source_of, len(self.names))
        self._losses = SourceLosses(len(self.names))
        self.start = first(self.options, self.names, self._whole.sizes)
        self.weights = self.start.clone()
        self.reference = by_name(self.options, "reference", self.names)
        self._drawn = Drawn(self._whole)
        self._history = MixHistory()
        self._history.note(0, self.weights, self._losses.latest, None)
        if self._loaded is not None:
            kept, self._loaded = self._loaded, None
            self.load_state_dict(kept)

    @property
    def members(self) -> Members:
        """Which samples each source has."""
        if self._whole is None:
            raise RequestError(
                "Mix does not know the sources of the samples; give sources=sparing.Sources({...}) "
                "or a tensor (N,), or train on data that has domains and domain_of"
            )
        return self._whole

    @property
    def losses(self) -> SourceLosses:
        """What is known of the losses by source."""
        _ = self.members
        assert self._losses is not None
        return self._losses

    # ---- attaching ---------------------------------------------------------------------------

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        self.setup = setup
        return model

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
        self.seed = seed
        self.model = self.model if model is None else model
        setup = self.setup
        domain_of = None if setup is None or self._own_sources else setup.domain_of
        if size is not None and setup is not None and domain_of is not None:
            self._tell(domain_of(torch.arange(size)), setup.domains)
        _ = self.members  # sources that nobody knows are an error before the first step
        if size is not None and size != self.members.source_of.size:
            raise RequestError(
                f"the data set has {size} samples, and sources were given for "
                f"{self.members.source_of.size}"
            )
        by_losses = self.options.by_loss and self.options.losses == "probe"
        if self.measure is not None or not (by_losses or self.options.rule == "gate-load"):
            return
        if setup is None or setup.loss is None:
            raise RequestError(
                f'rule "{self.options.rule}" looks at losses or gate loads of samples between '
                "steps, and this loop told no loss: give the session losses=..., or measure=..."
            )
        if not by_losses and model is not None and not tells_loads(model):
            raise RequestError(
                'rule "gate-load" needs a model with experts; attach a method that makes them, '
                "such as top-k, or give measure=..."
            )

    # ---- plans -------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Samples of an epoch."""
        return max(1, rounded(self.options.share, self.members.source_of.size))

    def order(self, clock: Clock) -> Plan | None:
        if self.options.rule == "none":
            self._epoch = clock.epoch
            return None
        self._make(clock.epoch, clock.dealt)
        assert self._plan is not None
        return Plan(tensor(self._plan))

    def _make(self, epoch: int, dealt: int) -> None:
        """The plan of ``epoch``, whose first ``dealt`` places stay as they are."""
        if self._plan is not None and epoch != self._epoch:
            self._drawn.close_(self._plan)
            self._plan, dealt = None, 0
        kept = self._plan[:dealt] if self._plan is not None else np.zeros(0, np.int64)
        if len(kept) < dealt:
            raise RequestError(f"{dealt} places are dealt of a plan that was never made")
        rest = mixed(
            self.members,
            self.weights,
            self.length - dealt,
            self._drawn.with_dealt_(kept),
            seed=self.seed,
            at=(epoch, dealt),
        )
        self._plan, self._epoch, self._due = np.concatenate((kept, rest)), epoch, False

    def replans(self, clock: Clock) -> bool:
        return self._due and self.options.rule != "none"

    # ---- losses ------------------------------------------------------------------------------

    def loss(self, losses: Tensor, context: Context | Tensor, outputs: Any = None) -> Tensor:
        """Note the losses by source; they stay as they are.

        ``context``: a host's, then the losses (B,) come back; or the ids (B,) int64 that came with
        the batch, then their mean. Raises RequestError for losses that are reduced already.
        """
        if losses.ndim != 1:
            raise RequestError(
                f"losses must have one value for each sample, shape (B,), got {tuple(losses.shape)}"
            )
        hosted = isinstance(context, Context)
        ids = context.index[:, 0] if isinstance(context, Context) else context.reshape(-1)
        if ids.shape != losses.shape:
            raise RequestError(f"{losses.shape[0]} losses came with {ids.numel()} ids")
        if torch.is_grad_enabled():
            source = torch.from_numpy(self.members.source_of[ids.cpu().numpy()]).long()
            self.losses.add(source, losses)
            self._reported += losses.shape[0]
        return losses if hosted else losses.mean()

    # ---- ticks -------------------------------------------------------------------------------

    def step(self, clock: Clock, optimizer: torch.optim.Optimizer | None) -> None:
        every = self.options.every
        if clock.epoch_ended or every is None:
            at = clock.epoch_ended and every is None
        else:
            at = clock.step % every == 0
        if at:
            self._tick(clock.step)

    def _tick(self, step: int) -> None:
        """All ranks together: losses are merged, weights and the rest of the plan made anew."""
        self.ticks += 1
        self.losses.merge_()
        signal: Tensor | None = None
        options = self.options
        if options.moves:
            self.weights, signal = updated(self)
            # what measure() told may differ between ranks; what it comes to may not
            ranks.broadcast_([self.weights] if signal is None else [self.weights, signal])
        self._history.note(step, self.weights, self.losses.latest, signal)
        self._due = options.moves

    # ---- a torch Sampler ---------------------------------------------------------------------

    def tick(self) -> None:
        """In a plain loop, on every rank after each optimizer step: what a host's clock does."""
        self._steps += 1
        every = self.options.every
        if every is None or self._steps % every:
            return
        self._tick(self._steps)
        if not self._due or self._plan is None:
            return
        # what loaders of other ranks have already must not change for this one either
        self._dealt = max(ranks.gather(self._dealt))
        self._make(self._epoch, min(self._dealt, self.length))

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch and make its plan; all ranks call it. Earlier epochs are ignored."""
        require_whole("epoch", epoch, 0)
        if self._plan is None or epoch > self._epoch:
            if self._plan is not None and self.options.every is None:
                self._tick(self._steps)
            self._make(max(epoch, self._epoch), 0)
            self._dealt = self._reported = self._start = 0
            self._exhausted = False

    def __len__(self) -> int:
        """The ids that ``iter`` gives to this rank."""
        left = self.length - self._start
        return left // ranks.world_size() if self.shard else left

    def __iter__(self) -> Iterator[int]:
        """The ids of the epoch, or of what is left of it after a resume.

        Each is looked up when a loader asks for it: a tick changes what comes after.
        """
        if self.options.rule == "none":
            raise RequestError('rule "none" makes no plan; take another sampler, or rule "size"')
        if self._plan is not None and self._exhausted:
            self.set_epoch(self._epoch + 1)
        elif self._plan is None:
            self.set_epoch(self._epoch)
        assert self._plan is not None
        world, first = (ranks.world_size(), ranks.rank()) if self.shard else (1, 0)
        epoch, self._dealt = self._epoch, self._start
        for place in range(self._start, self.length - (self.length - self._start) % world, world):
            if self._epoch != epoch:
                return
            self._dealt = max(self._dealt, place + world)
            yield int(self._plan[place + first])
        self._dealt, self._exhausted = self.length, True

    # ---- account, page, state ----------------------------------------------------------------

    def account(self, ledger: Ledger) -> None:
        """Enter what looking cost: forward passes, each a third of what a training sample takes."""
        seen, self.seen = self.seen // ranks.world_size(), 0
        trained, spent = ledger.spent("samples"), ledger.spent("flops") - self._paid
        cost = seen * spent // (3 * trained) if trained else 0
        self._paid += cost
        ledger.add("flops", spent=cost, dense=0)

    def signals(self) -> dict[str, Signal]:
        if self._whole is None:
            return {}
        latest = self.losses.latest
        return {
            "weights": self.weights.tolist(),
            "losses": torch.where(torch.isfinite(latest), latest, 0.0).tolist(),
            "drawn": (self.losses.drawn + self.losses.counts).tolist(),
            "ticks": self.ticks,
            "largest_weight": float(self.weights.max()),
        }

    def page(
        self, model: nn.Module, passages: list[dict[str, Any]], read: Callable[[Any], Any]
    ) -> dict[str, Any]:
        if self._whole is None:
            return {}
        return {
            "mixture": {
                "rule": self.options.rule,
                "form": self.options.formed if self.options.moves else "",
                "sources": list(self.names),
                "sizes": self.members.sizes.tolist(),
                "drawn": (self.losses.drawn + self.losses.counts).tolist(),
                **self._history.state_dict(),
            }
        }

    def __getstate__(self) -> dict[str, Any]:
        # what belongs to a host, no file can hold
        return {**self.__dict__, "setup": None, "model": None, "measure": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Mix:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        # a host's own functions are shared: to copy what they are bound to would copy the host
        shared = {name: self.__dict__[name] for name in ("setup", "measure")}
        rest = {name: value for name, value in self.__dict__.items() if name not in shared}
        copied.__dict__.update(copy.deepcopy(rest, memo), **shared)
        return copied

    def state_dict(self) -> dict[str, Any]:
        """Weights, the plan, and how far it is used. On several ranks the losses since the last
        tick are each rank's own."""
        if self._loaded is not None:
            return self._loaded
        return {"names": None} if self._whole is None else MixState.of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` stood. Raises RequestError for the state of other sources."""
        if self._whole is None:
            self._loaded = state if state["names"] is not None else None
        elif state["names"] is not None:
            MixState.restore_(self, state)
