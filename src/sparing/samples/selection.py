"""What a policy decides about one epoch: which samples, in which order, with which weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.errors import unknown
from sparing.core.method import Plan
from sparing.samples.draw import Bytes, Ids, Random, shuffled

Normalise = Literal["none", "batch", "epoch"]
NORMALISE: Mapping[str, str] = {
    "none": "weights as they are: the sum over an epoch is unbiased, steps are larger",
    "batch": "a batch's weights are divided by their mean: no step is larger, slightly biased",
    "epoch": "an epoch's weights are divided by their mean: the mean over an epoch is unbiased",
}
"""What each way to normalise keeps."""


@final
@dataclass(frozen=True, slots=True)
class Selection:
    """An epoch's samples, compactly: 5 bytes for each sample.

    ``index``: (n,) int32, in the order in which they come. ``code``: (N,) uint8, the stratum of
    each sample by id, 0 if the epoch leaves it out. ``weights``: (G,) float32, by code; or (N,)
    float32 by id where ``code`` is None; None where all weights are 1.
    """

    index: Ids
    code: Bytes | None = None
    weights: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return int(self.index.size)

    def weight_of(self, ids: NDArray[Any]) -> NDArray[np.float32] | None:
        """The weights of samples by id: (B,) -> (B,) float32; None where all are 1."""
        if self.weights is None:
            return None
        found: NDArray[np.float32] = self.weights[ids if self.code is None else self.code[ids]]
        return found

    def mean_weight(self) -> float:
        """The mean over the epoch's samples."""
        if self.weights is None or not len(self):
            return 1.0
        if self.code is not None:
            counts = np.bincount(self.code, minlength=self.weights.size)
            counts[0] = 0
            return float(counts @ self.weights.astype(np.float64) / counts.sum())
        blocks = range(0, len(self), 1 << 20)
        sums = [
            self.weights[self.index[at : at + (1 << 20)]].sum(dtype=np.float64) for at in blocks
        ]
        return float(sum(sums) / len(self))

    def plan(self) -> Plan:
        """The same as the library's plan, with a weight for each place."""
        weight = self.weight_of(self.index)
        index = torch.from_numpy(self.index)
        return Plan(index, None if weight is None else torch.from_numpy(weight))

    def state_dict(self) -> dict[str, Tensor | None]:
        """Tensors that share this selection's memory."""
        parts = {"index": self.index, "code": self.code, "weights": self.weights}
        return {k: None if v is None else torch.from_numpy(v) for k, v in parts.items()}

    @staticmethod
    def of(state: Mapping[str, Tensor | None]) -> Selection:
        """What ``state_dict`` gave, in memory of its own."""
        read: dict[str, Any] = {
            k: None if v is None else v.numpy().copy() for k, v in state.items()
        }
        return Selection(**read)


def everything(size: int, random: Random) -> Selection:
    """All samples, each once, in random order, weight 1."""
    return Selection(shuffled(np.ones(size, dtype=bool), random))


def chosen(code: Bytes, random: Random, weights: list[float] | None = None) -> Selection:
    """The samples whose code is not 0, each once, in random order.

    ``weights``: by code, that of 0 first; None, or 1 wherever it counts, for no weights.
    """
    index = shuffled(code != 0, random)
    if weights is None or all(weight == 1.0 for weight in weights[1:]):
        return Selection(index, code)
    return Selection(index, code, np.asarray(weights, dtype=np.float32))


def normalised(selection: Selection, how: str) -> Selection:
    """Weights divided by their mean over the epoch if ``how`` is "epoch", else as they are."""
    if how not in NORMALISE:
        raise unknown("way to normalise weights", how, NORMALISE)
    if how != "epoch" or selection.weights is None:
        return selection
    scaled = (selection.weights / selection.mean_weight()).astype(np.float32)
    if selection.code is not None and np.all(scaled[1:] == 1.0):
        return Selection(selection.index, selection.code)
    return Selection(selection.index, selection.code, scaled)
