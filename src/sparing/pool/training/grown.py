"""What growing a training set found: gains, reasons, and which samples are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Grown:
    """The outcome, by sample; N samples.

    gains: (N,) float32, NaN where cleaning dropped the sample. reasons: (N,) uint8, positions in
    ``REASONS``. kept: (N,) uint8, 1 where a static choice trains on it. group: (N,) int64, the
    sample that stands for it, itself if none does. arrived: (N,) int64, when it came. view:
    (N, 2) float32, a projection to look at. flops: what it cost, of matrix products.
    """

    gains: NDArray[np.float32]
    reasons: NDArray[np.uint8]
    kept: NDArray[np.uint8]
    group: NDArray[np.int64]
    arrived: NDArray[np.int64]
    view: NDArray[np.float32]
    flops: int

    @property
    def clean(self) -> NDArray[np.int64]:
        """The samples that cleaning left: (n,), ascending."""
        return np.flatnonzero(self.reasons == 0)

    def tensors(self) -> dict[str, Tensor]:
        """All arrays, as tensors that share their memory."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: torch.from_numpy(v) for k, v in found.items() if isinstance(v, np.ndarray)}

    def state_dict(self) -> dict[str, Any]:
        return {**self.tensors(), "flops": self.flops}

    @staticmethod
    def of(state: Mapping[str, Any]) -> Grown:
        """What ``state_dict`` gave, in memory of its own."""
        read: dict[str, Any] = {
            k: v.numpy().copy() if isinstance(v, Tensor) else v for k, v in state.items()
        }
        return Grown(**read)


def projected(vectors: Tensor) -> NDArray[np.float32]:
    """The two directions of largest variance: (N, d) -> (N, 2); signs so that skew is positive."""
    centred = vectors.double() - vectors.double().mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    flat = centred @ axes[:, -2:].flip(1)
    if flat.shape[1] < 2:  # vectors of one number
        flat = torch.nn.functional.pad(flat, (0, 2 - flat.shape[1]))
    signs = torch.where(flat.pow(3).sum(0) < 0, -1.0, 1.0)
    found: NDArray[np.float32] = (flat * signs).float().numpy()
    return found
