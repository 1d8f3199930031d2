"""What the plans of a training held: their lengths, how often each sample came, how hard it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from sparing.samples.page import kept_by_difficulty, summary
from sparing.samples.selection import Selection


@final
class History:
    """The plans so far, as numbers: 2 bytes for each sample, whatever the epochs."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.by_difficulty: list[list[float]] = []
        self.times: NDArray[np.uint16] | None = None

    def add(
        self,
        selection: Selection,
        size: int,
        scores: NDArray[np.float32] | None,
        *,
        repeats: bool = False,
    ) -> None:
        """Note a plan over ``size`` samples, made by ``scores``, (N,), where there are any.

        ``repeats``: a plan may hold a sample more than once, which counts once.
        """
        self.lengths.append(len(selection))
        if self.times is None:
            self.times = np.zeros(size, dtype=np.uint16)
        if selection.code is not None:
            self.times += selection.code != 0
        elif len(selection) == size and not repeats:
            self.times += 1
        else:
            present = np.zeros(size, dtype=bool)
            present[selection.index] = True
            self.times += present
        self.by_difficulty.append(kept_by_difficulty(scores, selection))

    def page(self, scores: NDArray[np.float32], size: int) -> dict[str, Any]:
        """What a report shows under ``selection``; {} before the first plan."""
        if self.times is None:
            return {}
        found = summary(scores, self.times, self.lengths, size, self.by_difficulty)
        return {"selection": found}

    def state_dict(self) -> dict[str, Any]:
        return {
            "lengths": list(self.lengths),
            "by_difficulty": [list(row) for row in self.by_difficulty],
            # uint16 has no word in the file format
            "times": None if self.times is None else torch.from_numpy(self.times.astype(np.int32)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lengths = list(state["lengths"])
        self.by_difficulty = [list(row) for row in state["by_difficulty"]]
        times = state["times"]
        self.times = None if times is None else times.numpy().astype(np.uint16)
