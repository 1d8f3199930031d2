"""Static coresets: score the samples in the first epochs, then train on a fixed part of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown
from sparing.samples import difficulty
from sparing.samples.draw import Random, rounded
from sparing.samples.infobatch import check_ratio
from sparing.samples.method import SampleSelection
from sparing.samples.options import SelectionOptions
from sparing.samples.scores import ScoreTable, check_ids
from sparing.samples.selection import Selection, chosen, everything
from sparing.samples.ucb import highest

BY = {
    "loss": "the mean loss",
    "el2n": "the norm of the error vector, from outputs that are logits (B, C)",
    "grand": "the norm of the last layer's gradient, told by observe",
    "forgetting": "how often it was right and then wrong again, from logits (B, C)",
    "herding": "features whose mean stays near the mean of all",
    "k-centre": "features far from each other",
}
OF_FEATURES = ("herding", "k-centre")
OF_LOGITS = ("el2n", "forgetting")
_NONE = np.zeros(0, dtype=np.int64)


def plan(
    epoch: int,
    scores: NDArray[np.float32],
    random: Random,
    *,
    ratio: float,
    start: int,
    hard: bool = True,
    before: Selection | None = None,
) -> Selection:
    """The samples of an epoch, counted from 0, all with weight 1.

    scores: (N,), NaN where unknown, which is kept. Full before epoch ``start``; from then on the
    ``round((1 - ratio) * N)`` with the highest scores (or the lowest), ties by lot; those of
    ``before`` again if it chose any.
    """
    if epoch < start:
        return everything(scores.size, random)
    if before is not None and before.code is not None:
        return chosen(before.code, random)
    keep = max(1, rounded(1 - ratio, scores.size))
    return chosen(highest(scores if hard else -scores, keep, random), random)


@final
@dataclass(frozen=True, kw_only=True)
class CoresetOptions(SelectionOptions):
    """Options of a static coreset.

    ratio: share that is left out, in [0, 1). by: "loss", "el2n", "grand", "forgetting", "herding"
    or "k-centre". start: full epochs in which samples are scored. hard: keep the highest scores,
    else the lowest.
    """

    ratio: float = 0.5
    by: str = "loss"
    start: int = 1
    hard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)
        if self.by not in BY:
            raise unknown("way to score a coreset", self.by, BY)
        require_whole("start", self.start, 0 if self.by in OF_FEATURES else 1)


@final
class Coreset(SampleSelection):
    """Trains on a part of the samples that is fixed after the first epochs; biased by design."""

    name: ClassVar[str] = "coreset"
    Options = CoresetOptions
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}

    def __init__(self, *, features: Tensor | None = None, **told: Any) -> None:
        self.features = features
        super().__init__(**told)

    @property
    def idle(self) -> bool:
        return bool(self.options.ratio == 0)

    def table(self, size: int) -> ScoreTable:
        if self.options.by == "forgetting":
            return ScoreTable(size, "forgetting")
        return ScoreTable(size, "window", window=max(1, self.options.start))

    def score(self, losses: Tensor, outputs: Any) -> Tensor:
        by = self.options.by
        if by not in OF_LOGITS:
            return losses
        logits = getattr(outputs, "logits", outputs)
        if not isinstance(logits, Tensor) or logits.shape[:-1] != losses.shape:
            raise RequestError(
                f'by="{by}" reads logits (B, C); give them, as in loss(losses, index, logits)'
            )
        read = difficulty.el2n_of_losses if by == "el2n" else difficulty.correct_of_losses
        return read(logits, losses)

    def note(self, ids: Tensor, losses: Tensor, outputs: Any) -> None:
        # once the choice is made, or where it is not by losses, there is nothing to learn
        if self._epoch < self.options.start and self.options.by not in (*OF_FEATURES, "grand"):
            super().note(ids, losses, outputs)
        else:
            check_ids(ids.numpy() if ids.device.type == "cpu" else _NONE, self.size, False)

    def observe(self, scores: Tensor, index: Tensor) -> None:
        """Tell scores of your own, (B,), such as ``difficulty.grand``, of the samples ``index``."""
        if self._epoch < self.options.start:
            self.scores.update_(index, scores)

    def choose(self, epoch: int, scores: ScoreTable, random: Random) -> Selection:
        o = self.options
        values = scores.value
        if o.by == "forgetting":  # a sample that was never right matters most
            values = np.where(scores.column("ever") > 0, values, np.float32(np.inf))
        if o.by in OF_FEATURES and epoch >= o.start and not _chose(self._selection):
            values = self._order_of_features()
        elif o.by == "grand" and epoch >= o.start and np.isnan(values).all():
            raise RequestError(
                'by="grand" needs scores; tell them in the first epochs by observe(scores, index)'
            )
        return plan(
            epoch,
            values,
            random,
            ratio=o.ratio,
            start=o.start,
            hard=o.hard or o.by in OF_FEATURES,
            before=self._selection,
        )

    def _order_of_features(self) -> NDArray[np.float32]:
        """Scores that put first what herding or k-centre chooses."""
        features = self.features
        if features is None or features.ndim != 2 or len(features) != self.size:
            shape = None if features is None else tuple(features.shape)
            raise RequestError(
                f'by="{self.options.by}" needs features of all {self.size} samples, shape (N, d), '
                f"got {shape}; give them, as in Coreset(features=...)"
            )
        keep = max(1, rounded(1 - self.options.ratio, self.size))
        choice = difficulty.herding if self.options.by == "herding" else difficulty.k_centre
        values = np.zeros(self.size, dtype=np.float32)
        values[choice(features.detach().cpu(), keep).numpy()] = 1.0
        return values

    def bounds(self, epoch: int) -> tuple[int, int]:
        if epoch < self.options.start or self.idle:
            return self.size, self.size
        keep = max(1, rounded(1 - self.options.ratio, self.size))
        return keep, keep


def _chose(selection: Selection | None) -> bool:
    return selection is not None and selection.code is not None
