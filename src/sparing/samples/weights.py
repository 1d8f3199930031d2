"""The weights of a plan, looked up by id on the device where the losses are."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.samples.selection import Selection


@final
class Weights:
    """Looks up weights by id; ``by_batch`` divides them by their mean over each batch."""

    def __init__(self, selection: Selection, *, by_batch: bool) -> None:
        self.selection, self.by_batch = selection, by_batch
        self._there: dict[torch.device, tuple[Tensor | None, Tensor]] = {}

    def of(self, ids: Tensor, device: torch.device) -> Tensor | None:
        """(B,) int64 -> (B,) float32 on ``device``; None where all weights are 1.

        Ids on the CPU that the plan leaves out raise RequestError; on other devices, where looking
        would wait, they weigh nothing.
        """
        weight = self._raw(ids, device)
        return weight / weight.mean() if self.by_batch and weight is not None else weight

    def of_rows(self, index: Tensor, share: Tensor, device: torch.device) -> Tensor | None:
        """Weights of rows mixed of k samples: (B, k) ids and shares -> (B,)."""
        if index.shape[1] == 1:
            return self.of(index[:, 0], device)
        found = self._raw(index.reshape(-1), device)
        if found is None:
            return None
        weight = (found.reshape(index.shape) * share.to(device)).sum(1)
        return weight / weight.mean() if self.by_batch else weight

    def _raw(self, ids: Tensor, device: torch.device) -> Tensor | None:
        selection = self.selection
        if ids.device.type == "cpu":
            here = ids.numpy()
            if selection.code is not None:
                _check(selection.code[here], here)
            weight = selection.weight_of(here)
            if weight is None:
                return None
            return torch.from_numpy(weight).to(device, non_blocking=True)
        if selection.weights is None:
            return None
        if ids.device not in self._there:
            code = selection.code
            self._there[ids.device] = (
                None if code is None else torch.from_numpy(code).to(ids.device),
                torch.from_numpy(selection.weights).to(ids.device),
            )
        code_there, weights = self._there[ids.device]
        if code_there is None:
            return weights[ids.clamp(0, len(weights) - 1)]
        return weights[code_there[ids.clamp(0, len(code_there) - 1)].int()]


def _check(codes: np.ndarray[tuple[int], np.dtype[np.uint8]], ids: np.ndarray) -> None:
    if codes.size and not codes.all():
        left = ids[codes == 0]
        raise RequestError(
            f"{left.size} of {ids.size} ids are not in the epoch's plan, such as {int(left[0])}; "
            "give the ids that came with the batch (sparing.indexed), not places in it"
        )
