"""The mean loss of each source since the last tick, over all ranks."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from sparing.core import ranks


@final
class SourceLosses:
    """Sums of losses and samples by source; ``latest`` is (D,) float64, NaN where none is known."""

    def __init__(self, sources: int) -> None:
        self.sums = torch.zeros(sources, dtype=torch.float64)
        self.counts = torch.zeros(sources, dtype=torch.int64)
        self.latest = torch.full((sources,), torch.nan, dtype=torch.float64)
        self.drawn = torch.zeros(sources, dtype=torch.int64)

    def add(self, source: Tensor, losses: Tensor) -> None:
        """source: (B,) int64, losses: (B,); what is not finite is not counted."""
        each = losses.detach().to("cpu", torch.float64)
        source = source.cpu()
        good = torch.isfinite(each)
        self.sums.index_add_(0, source[good], each[good])
        self.counts += torch.bincount(source[good], minlength=self.counts.numel())

    def merge_(self) -> None:
        """Add up over ranks, which all call it; a source without samples keeps its loss."""
        ranks.sum_([self.sums, self.counts])
        came = self.counts > 0
        self.latest[came] = self.sums[came] / self.counts[came]
        self.drawn += self.counts
        self.sums.zero_()
        self.counts.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in ("sums", "counts", "latest", "drawn")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("sums", "counts", "latest", "drawn"):
            setattr(self, name, state[name].clone())
