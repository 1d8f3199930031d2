"""Sampling by gain: how much a sample adds to what the data set has already.

InfoGrowth (Qin et al., ECCV 2024, arXiv 2405.18347): gains divided by their 99th percentile and
clipped to [0, 1] are probabilities; epochs are drawn in proportion to them, or alternate between
them and their complement.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.checks import require_number
from sparing.core.errors import RequestError
from sparing.samples.draw import BLOCK, Random, rounded, shuffled
from sparing.samples.method import SampleSelection
from sparing.samples.options import SelectionOptions
from sparing.samples.scores import ScoreTable
from sparing.samples.selection import Selection, everything

LEAST = 0.1
"""The least probability in epochs of low gain, as in the released code."""


def probabilities(gains: NDArray[np.float32], strength: float = 1.0) -> NDArray[np.float32]:
    """Gains, (N,) and not negative, as probabilities in [0, 1]; NaN, an unknown gain, as 1.

    ``min(1, gain / the 99th percentile) ** strength``; all 1 where no gain is above 0.
    """
    known = gains[~np.isnan(gains)]
    place = (known.size - 1) * 99 // 100
    top = float(np.partition(known, place)[place]) if known.size else 0.0
    if top <= 0:
        return np.ones(gains.size, dtype=np.float32)
    clipped: NDArray[np.float32] = np.clip(
        np.nan_to_num(gains / np.float32(top), nan=1.0), 0.0, 1.0
    )
    return np.power(clipped, strength).astype(np.float32, copy=False)


def _drawn(
    chance: NDArray[np.float32], factor: float, random: Random, total: int | None
) -> NDArray[np.uint16]:
    """Whole counts of mean ``factor * chance``, each the one just below or above it.

    Systematic sampling (Madow 1949), block by block; exactly ``total`` in all if that is given.
    """
    counts = np.zeros(chance.size, dtype=np.uint16)
    start, taken = random.random(), 0
    passed = start
    for at in range(0, chance.size, BLOCK):
        part = chance[at : at + BLOCK].astype(np.float64) * factor
        edges = passed + np.cumsum(part)
        whole = np.floor(edges).astype(np.int64)
        if total is not None:
            last = at + BLOCK >= chance.size
            whole = np.minimum(whole, total)
            if last:  # rounding of sums must not lose the last draw
                whole[-1] = total
        counts[at : at + BLOCK] = np.diff(whole, prepend=taken)
        passed, taken = float(edges[-1]), int(whole[-1])
    return counts


def proportional(
    gains: NDArray[np.float32], random: Random, *, strength: float, share: float, rescale: bool
) -> Selection:
    """An epoch of exactly ``round(share * N)`` draws; a sample may come several times.

    The expected number of times is in proportion to its probability. With ``rescale`` each draw
    weighs the inverse of that expectation, so that the sum of weighted gradients is unbiased,
    except for samples of probability 0, which never come.
    """
    chance = probabilities(gains, strength)
    length = max(1, rounded(share, gains.size))
    mass = float(chance.sum(dtype=np.float64))
    index = shuffled(_drawn(chance, length / mass, random, length), random)
    if not rescale:
        return Selection(index)
    return Selection(index, None, _inverse(chance * np.float32(length / mass)))


def phase(
    epoch: int, gains: NDArray[np.float32], random: Random, *, strength: float, rescale: bool
) -> Selection:
    """Odd epochs take each sample with its probability p, even ones with max(1 - p, 0.1).

    With ``rescale`` a sample weighs the inverse of the probability that it had in this epoch.
    """
    chance = probabilities(gains, strength)
    if epoch % 2 == 0:
        chance = np.maximum(1 - chance, np.float32(LEAST)) if strength else chance
    counts = _drawn(chance, 1.0, random, None)
    if not counts.any():
        counts[random.integers(counts.size)] = 1
    index = shuffled(counts, random)
    return Selection(index, None, _inverse(chance)) if rescale else Selection(index)


def _inverse(expected: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(1, expected, out=np.zeros_like(expected), where=expected > 0)


@dataclass(frozen=True, kw_only=True)
class GainOptions(SelectionOptions):
    """Abstract: options of sampling by gain.

    strength: exponent of the probabilities; 0 takes every sample alike. rescale: weigh a draw by
    the inverse of its expectation, which the paper does not.
    """

    strength: float = 1.0
    rescale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("strength", self.strength, 0)


@final
@dataclass(frozen=True, kw_only=True)
class GainProportionalOptions(GainOptions):
    """Options of gain-proportional sampling; see GainOptions.

    share: draws of an epoch, as a share of the samples.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("share", self.share, 0)
        if self.share == 0:
            raise RequestError("share must be above 0")


@final
@dataclass(frozen=True, kw_only=True)
class TwoPhaseOptions(GainOptions):
    """Options of two-phase sampling; see GainOptions."""


class ByGain(SampleSelection):
    """Abstract: samples by ``gains``, (N,), not negative; without them by the latest losses."""

    repeats: ClassVar[bool] = True

    def __init__(self, *, gains: Tensor | None = None, **told: Any) -> None:
        self._gains: NDArray[np.float32] | None = None
        super().__init__(**told)
        if gains is not None:
            self.set_gains_(gains)

    def set_gains_(self, gains: Tensor) -> None:
        """Give the gains of all samples, (N,); they count from the next plan on."""
        if gains.ndim != 1 or (self._size is not None and gains.shape[0] != self._size):
            raise RequestError(
                f"gains must have one value for each of the {self._size} samples, got shape "
                f"{tuple(gains.shape)}"
            )
        kept = gains.detach().to("cpu", torch.float32, copy=True).numpy()
        if not np.isfinite(kept).all() or (kept < 0).any():
            raise RequestError("gains must be finite and not negative")
        self._gains = kept

    def gains_of(self, scores: ScoreTable) -> NDArray[np.float32]:
        """The gains, or the latest losses where none were given; never below 0."""
        return np.maximum(scores.value, 0) if self._gains is None else self._gains

    @property
    def idle(self) -> bool:
        return bool(self.options.strength == 0)

    @abc.abstractmethod
    def draw(self, epoch: int, gains: NDArray[np.float32], random: Random) -> Selection:
        """The epoch's draws."""

    def choose(self, epoch: int, scores: ScoreTable, random: Random) -> Selection:
        gains = self.gains_of(scores)
        if np.isnan(gains).all():
            return everything(self.size, random)
        if gains.size != self.size:
            raise RequestError(f"there are {gains.size} gains for {self.size} samples")
        return self.draw(epoch, gains, random)

    def state_dict(self) -> dict[str, Any]:
        gains = self._gains
        return {
            **super().state_dict(),
            "gains": None if gains is None else torch.from_numpy(gains.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = state.get("gains")
        self._gains = None if kept is None else kept.numpy().copy()
        super().load_state_dict(state)


@final
class GainProportional(ByGain):
    """Draws an epoch in proportion to the samples' gains."""

    name: ClassVar[str] = "gain-proportional"
    Options = GainProportionalOptions
    identity: ClassVar[Mapping[str, Any]] = {"strength": 0.0}

    @property
    def idle(self) -> bool:
        return bool(self.options.strength == 0 and self.options.share == 1)

    def draw(self, epoch: int, gains: NDArray[np.float32], random: Random) -> Selection:
        o = self.options
        return proportional(gains, random, strength=o.strength, share=o.share, rescale=o.rescale)

    def bounds(self, epoch: int) -> tuple[int, int]:
        length = max(1, rounded(self.options.share, self.size))
        return (self.size, self.size) if epoch == 0 and self._gains is None else (length, length)


@final
class TwoPhase(ByGain):
    """Epochs of samples with a high gain and of those with a low one, in turn."""

    name: ClassVar[str] = "two-phase"
    Options = TwoPhaseOptions
    identity: ClassVar[Mapping[str, Any]] = {"strength": 0.0}

    def draw(self, epoch: int, gains: NDArray[np.float32], random: Random) -> Selection:
        return phase(
            epoch, gains, random, strength=self.options.strength, rescale=self.options.rescale
        )

    def bounds(self, epoch: int) -> tuple[int, int]:
        if self.idle or (epoch == 0 and self._gains is None):
            return self.size, self.size
        return 1, self.size
