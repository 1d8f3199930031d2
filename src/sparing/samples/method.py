"""What all methods that choose samples share: scores, one frozen plan an epoch, weights, account.

One object is at once a ``Method`` for a host and a torch ``Sampler`` for a plain loop::

    sampler = sparing.InfoBatch(ratio=0.5, size=len(train_set), epochs=30)
    loader = DataLoader(sparing.indexed(train_set), sampler=sampler, batch_size=128)
    for index, x, y in loader:
        losses = F.cross_entropy(model(x), y, reduction="none")
        sampler.loss(losses, index).backward()
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Sampler

from sparing.core import ranks
from sparing.core.checks import require_whole
from sparing.core.clock import Clock
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Context, Method, Plan, Signal
from sparing.samples import draw
from sparing.samples.history import History
from sparing.samples.left_out import LeftOut
from sparing.samples.saved import Saved
from sparing.samples.scores import ScoreTable
from sparing.samples.selection import Selection, everything, normalised
from sparing.samples.steps import Steps, total
from sparing.samples.weights import Weights

CHUNK = 1 << 16
"""Ids that are turned into Python numbers at once."""


class SampleSelection(Method, Sampler[int]):
    """Abstract: plans an epoch from the scores of samples.

    Args:
        size: samples of the data set; a host tells it by ``bind``.
        epochs: how many are planned; for methods that end with full epochs.
        seed: of the plans; ranks need the same one.
        shard: give each rank its share of every plan, as ``DistributedSampler`` does, for a plain
            DataLoader under torchrun. Accelerate and the hosts share batches out themselves.
        options: those of the method, by keyword.

    A plan is made once an epoch and frozen. It ends when all of its samples were trained on, or
    by ``set_epoch``; only there do ranks talk to each other. Neither ``iter`` nor ``len`` changes
    it. The epoch never goes backwards: ``set_epoch`` with an earlier one is ignored, since loaders
    that count from 0 again after a resume call it so.
    """

    loss_stage: ClassVar[Literal["sample", "weight", "batch"]] = "weight"
    scored: ClassVar[bool] = True
    """Whether plans depend on the losses."""
    repeats: ClassVar[bool] = False
    """Whether a plan may hold a sample more than once."""

    def __init__(
        self,
        *,
        size: int | None = None,
        epochs: int | None = None,
        seed: int = 0,
        shard: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.shard = shard
        self._size: int | None = None
        self._epochs: int | None = None
        self._seed = seed
        self._scores: ScoreTable | None = None
        self._selection: Selection | None = None
        self._weights: Weights | None = None
        self._epoch = 0
        self._start = self._reported = 0
        self._exhausted = self._trained = False
        self._history = History()
        self._left_out = LeftOut()
        self._loaded: dict[str, Any] | None = None
        if size is not None or epochs is not None:
            self.bind(size=size, epochs=epochs, seed=seed)

    # ---- what a policy decides ---------------------------------------------------------------

    @abc.abstractmethod
    def choose(self, epoch: int, scores: ScoreTable, random: draw.Random) -> Selection:
        """The epoch's samples and weights, before these are normalised."""

    @abc.abstractmethod
    def bounds(self, epoch: int) -> tuple[int, int]:
        """The least and the most samples that the epoch can hold."""

    def table(self, size: int) -> ScoreTable:
        """A fresh table of scores, in the mode that the policy reads."""
        return ScoreTable(size, repeats=self.repeats)

    @property
    def idle(self) -> bool:
        """Whether the options choose nothing: the order is then left to others."""
        return False

    @property
    def anneals(self) -> bool:
        """Whether the number of epochs must be known."""
        return False

    def score(self, losses: Tensor, outputs: Any) -> Tensor:
        """What the table keeps of a batch: its losses, (B,)."""
        return losses

    def note(self, ids: Tensor, losses: Tensor, outputs: Any) -> None:
        """Keep the scores of a batch."""
        self.scores.update_(ids, self.score(losses, outputs))

    @classmethod
    def at_random(
        cls, options: Mapping[str, Any], signals: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]] | None:
        """Random samples, as many in each epoch."""
        return {"random-samples": {"lengths": list(signals.get("lengths", [])) or None}}

    # ---- attaching ---------------------------------------------------------------------------

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
        if size is not None:
            require_whole("size", size, 1)
            if self._size not in (None, size):
                raise RequestError(
                    f"the data set had {self._size} samples and has {size} now; the id of a sample "
                    "must stay the same during training: make a new sampler for the new data"
                )
            self._size = size
        if epochs is not None:
            require_whole("epochs", epochs, 1)
            self._epochs = epochs
        self._seed = seed
        if self._loaded is not None and self._size is not None:
            kept, self._loaded = self._loaded, None
            self.load_state_dict(kept)

    @property
    def size(self) -> int:
        """Samples of the data set."""
        if self._size is None:
            raise RequestError(
                f"{type(self).__name__} does not know the data set's length; give it, as in "
                f"{type(self).__name__}(size=len(train_set))"
            )
        return self._size

    @property
    def epochs(self) -> int:
        """The planned epochs, for policies that need them."""
        if self._epochs is None:
            raise RequestError(
                f"{type(self).__name__} ends with full epochs and must know how many there are; "
                "give epochs=..., or delta=1 to choose to the end"
            )
        return self._epochs

    @property
    def scores(self) -> ScoreTable:
        """The scores of all samples."""
        if self._scores is None:
            self._scores = self.table(self.size)
        return self._scores

    # ---- plans -------------------------------------------------------------------------------

    def order(self, clock: Clock) -> Plan | None:
        if self.anneals:
            _ = self.epochs  # an unknown number is an error before the first epoch, not late
        if self.idle:
            self._epoch = clock.epoch
            return None
        if self._selection is None or self._epoch != clock.epoch or self._reported:
            self._make(clock.epoch)
        assert self._selection is not None
        return self._selection.plan()

    def _make(self, epoch: int) -> None:
        if self.anneals:
            _ = self.epochs
        random = draw.generator(self._seed, epoch)
        if self.idle:
            selection = everything(self.size, random)
        else:
            chosen = self.choose(epoch, self.scores, random)
            selection = normalised(chosen, self.options.normalise)
        if not len(selection):
            raise RequestError(
                f"the plan of epoch {epoch} holds no sample of {self.size}; keep more of them"
            )
        self._selection, self._epoch, self._exhausted = selection, epoch, False
        self._weights = Weights(selection, by_batch=self.options.normalise == "batch")
        self._start = self._reported = 0
        self._trained = False
        scores = self._scores.value if self._scores is not None else None
        self._history.add(selection, self.size, scores, repeats=self.repeats)

    @property
    def selection(self) -> Selection:
        """The plan of the current epoch, in its compact form; made if there is none yet."""
        if self._selection is None:
            self._make(self._epoch)
        assert self._selection is not None
        return self._selection

    @property
    def epoch(self) -> int:
        """The epoch to train now: the current one, or the next if all of it was trained on."""
        return self._epoch + self._complete

    @property
    def progress(self) -> float:
        """(epoch + the share of its plan that is done) / epochs, in [0, 1]."""
        if self._epochs is None:
            raise RequestError("progress needs the number of epochs; give epochs=...")
        share = self._done / len(self._selection) if self._selection is not None else 0.0
        return min(1.0, (self._epoch + share) / self._epochs)

    @property
    def _done(self) -> int:
        """Places of the plan that were trained on, by all ranks, which go in step."""
        if self._selection is None:
            return 0
        return min(len(self._selection), self._start + self._reported * ranks.world_size())

    @property
    def _complete(self) -> bool:
        if self._selection is None or not self._reported:
            return False
        left = len(self._selection) - self._done
        return left < ranks.world_size() if self.shard else left == 0

    # ---- a torch Sampler ---------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch and make its plan; all ranks call it. Earlier epochs are ignored."""
        require_whole("epoch", epoch, 0)
        if epoch > self._epoch or self._selection is None:
            self.scores.merge_()
            self._make(max(epoch, self._epoch))

    def __len__(self) -> int:
        """How many ids ``iter`` will give to this rank now: exact before the epoch begins."""
        if self._complete and not ranks.distributed():
            self._make(self._epoch + 1)
        return self._share(len(self.selection) - self._start)

    def _share(self, count: int) -> int:
        return count // ranks.world_size() if self.shard else count

    def __iter__(self) -> Iterator[int]:
        """The ids of the epoch, or of what is left of it after a resume."""
        trained = self._reported > 0 or not self.scored
        if self._selection is not None and (self._complete or (self._exhausted and trained)):
            self.set_epoch(self._epoch + 1)
        selection, start = self.selection, self._start
        world, first = (ranks.world_size(), ranks.rank()) if self.shard else (1, 0)
        end = start + (len(selection) - start) // world * world
        index = selection.index[start:end]
        for low in range(0, len(index), CHUNK * world):
            yield from index[low : low + CHUNK * world][first::world].tolist()
        if self._selection is selection:
            self._exhausted = True

    # ---- losses ------------------------------------------------------------------------------

    def loss(self, losses: Tensor, context: Context | Tensor, outputs: Any = None) -> Tensor:
        """Note the losses as scores, and weigh them.

        ``losses``: (B,), one for each sample, with gradient. ``context``: a host's, then the
        weighted losses (B,) come back; or the ids (B,) int64 that came with the batch, then their
        weighted mean, the scalar to train on. Raises RequestError for losses that are reduced
        already, and for ids that do not fit them or are not in the epoch's plan.
        """
        if losses.ndim != 1:
            raise RequestError(_reduced(losses))
        if isinstance(context, Context):
            return self._in_host(losses, context, outputs)
        weights = self._current_weights()
        if torch.is_grad_enabled():
            self.note(context, losses, outputs)
            self._count(losses.shape[0])
        elif context.shape != losses.shape:
            raise RequestError(f"{losses.shape[0]} losses came with {context.numel()} ids")
        weight = weights.of(context, losses.device)
        return losses.mean() if weight is None else (losses * weight).mean()

    def batch_loss(self, loss: Tensor, index: Tensor, momentum: float = 0.7) -> Tensor:
        """For a loss that only comes as one number for a batch: a scalar to a scalar.

        Each sample's score becomes a moving average of the batch losses that it was part of,
        which tells samples apart only after many epochs; the loss is multiplied by the mean
        weight of the batch, since no sample's share of it is known. Losses per sample are better
        wherever they can be had. Batch losses as scores: github.com/mrazhou/BLS.
        """
        if loss.ndim != 0:
            raise RequestError(
                f"batch_loss takes one number, got shape {tuple(loss.shape)}; losses for each "
                "sample go to loss(losses, index)"
            )
        weights = self._current_weights()
        if torch.is_grad_enabled():
            self.scores.update_(index, loss.detach().expand(index.shape), momentum=momentum)
            self._count(index.shape[0])
        weight = weights.of(index, loss.device)
        return loss if weight is None else loss * weight.mean()

    def _current_weights(self) -> Weights:
        if self._weights is None:
            raise RequestError(
                f"{type(self).__name__} has planned no epoch yet; give it to the loader, as in "
                "DataLoader(sparing.indexed(data), sampler=sampler)"
            )
        return self._weights

    def _in_host(self, losses: Tensor, context: Context, outputs: Any) -> Tensor:
        if context.index.shape[0] != losses.shape[0]:
            raise RequestError(
                f"{losses.shape[0]} losses came with the ids of {context.index.shape[0]} samples"
            )
        ids = context.index[:, 0]
        mixed = context.index.shape[1] > 1
        if mixed:  # a mixed row tells most about the sample that is most of it
            ids = context.index.gather(1, context.share.argmax(1, keepdim=True))[:, 0]
        if torch.is_grad_enabled():
            if mixed:
                self.scores.repeats = True
            self.note(ids, losses, outputs)
            self._count(losses.shape[0])
        weight = context.weight
        if weight is not None:
            weight = weight.to(losses.device, non_blocking=True)
            if self.options.normalise == "batch":
                weight = weight / weight.mean()
        elif self._weights is not None:
            weight = self._weights.of_rows(context.index, context.share, losses.device)
        return losses if weight is None else losses * weight

    def _count(self, rows: int) -> None:
        self._reported += rows
        self._trained = True
        self._left_out.count(rows)

    # ---- epochs, account, state --------------------------------------------------------------

    def step(self, clock: Clock, optimizer: torch.optim.Optimizer | None) -> None:
        if clock.epoch_ended and self._size is not None:
            self.scores.merge_()

    def total_steps(
        self, batch_size: int, *, accumulate: int = 1, world: int = 1, drop_last: bool = False
    ) -> Steps:
        """Optimizer steps of the whole training, with ``batch_size`` for each of ``world`` ranks.

        Bounds before training, an estimate once losses are known, exact for fixed budgets.
        """
        return total(self, batch_size, accumulate=accumulate, world=world, drop_last=drop_last)

    def lengths(self) -> list[int]:
        """The lengths of the plans made so far."""
        return list(self._history.lengths)

    def preview(self, epoch: int) -> int | None:
        """The length of a later epoch's plan if it were made now; None while no loss is known."""
        least, most = self.bounds(epoch)
        if least == most:
            return least
        if self._scores is None or np.isnan(self.scores.value).all():
            return None
        return len(self.choose(epoch, self.scores, draw.generator(self._seed, epoch)))

    def account(self, ledger: Ledger) -> None:
        """Enter what the samples left out would have cost: as much as those that came."""
        planned = self._selection is not None
        held, whole = (len(self.selection), self.size) if planned else (1, 1)
        self._left_out.account(ledger, held=held, whole=whole)

    def signals(self) -> dict[str, Signal]:
        if self._selection is None:
            return {"rejected": self._scores.rejected if self._scores else 0}
        mean = self.scores.mean()
        return {
            "kept": len(self._selection),
            "kept_share": len(self._selection) / self.size,
            "mean_weight": self._selection.mean_weight(),
            "mean_score": mean if np.isfinite(mean) else 0.0,
            "rejected": self.scores.rejected,
            "lengths": self.lengths(),
        }

    def page(
        self, model: nn.Module, passages: list[dict[str, Any]], read: Callable[[Any], Any]
    ) -> dict[str, Any]:
        return self._history.page(self.scores.value, self.size) if self._history.lengths else {}

    def times_kept(self) -> NDArray[np.uint16]:
        """In how many epochs each sample came: (N,)."""
        times = self._history.times
        return np.zeros(self.size, np.uint16) if times is None else times

    def state_dict(self) -> dict[str, Any]:
        """Scores, the plan itself and the place in it. In mid-epoch on several ranks the scores
        of other ranks are theirs until the epoch ends."""
        if self._loaded is not None:
            return self._loaded
        return Saved.of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` stood, on any number of ranks: what is left of the plan is
        shared out anew. Raises RequestError for the state of another data set."""
        if self._size is None and state["size"] is not None:
            self._loaded = state  # until bind tells the size
            return
        Saved.restore_(self, state)


def _reduced(losses: Tensor) -> str:
    if losses.ndim == 0:
        return (
            "the loss is one number already; choosing samples needs one loss for each: use "
            'reduction="none" and give shape (B,), see sparing.sample_losses. If only a scalar '
            "can be had, use batch_loss(loss, index)"
        )
    return (
        f"losses must have shape (B,), got {tuple(losses.shape)}; reduce over everything but the "
        "batch, such as sparing.sample_losses.dense(losses, mask)"
    )
