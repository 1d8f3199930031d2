"""The draws of a mixture: exact counts, every sample of a source before any comes again."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.core.select import allocate
from sparing.samples import draw

Ids = NDArray[np.int64]


@final
class Members:
    """Which samples each of D sources has; source_of: (N,) int64, positions of sources.

    A source's samples are drawn along an endless row of permutations of them, so that none comes
    again before all came, whatever the weights were meanwhile. Where a draw stands is a function
    of the seed and of how many came before it: nothing but that count is kept.
    """

    def __init__(self, source_of: Tensor, sources: int) -> None:
        ids = source_of.detach().cpu().numpy()
        if ids.ndim != 1 or ids.size == 0:
            raise RequestError(f"sources of samples must be (N,), got shape {ids.shape}")
        if int(ids.min()) < 0 or int(ids.max()) >= sources:
            raise RequestError(
                f"samples name sources from {int(ids.min())} to {int(ids.max())}, and there are "
                f"those from 0 to {sources - 1}"
            )
        self.source_of = ids.astype(np.int32)
        self.sizes: Ids = np.bincount(ids, minlength=sources).astype(np.int64)
        self._order = np.argsort(self.source_of, kind="stable")
        self._first = np.concatenate(([0], np.cumsum(self.sizes)))
        self._turns: dict[int, tuple[tuple[int, int], Ids]] = {}

    def members(self, source: int) -> Ids:
        """The samples of a source, ascending."""
        return self._order[self._first[source] : self._first[source + 1]]

    def counts(self, index: Ids) -> Ids:
        """How many of the samples ``index``, (n,), are of each source: (D,)."""
        return np.bincount(self.source_of[index], minlength=self.sizes.size).astype(np.int64)

    def through(self, source: int, start: int, count: int, seed: int) -> Ids:
        """The samples of a source at ``start`` and after in its row of permutations: (count,)."""
        size, found = int(self.sizes[source]), []
        while count > 0:
            turn, place = divmod(start, size)
            part = self._permutation(source, turn, seed)[place : place + count]
            found.append(part)
            start, count = start + part.size, count - part.size
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _permutation(self, source: int, turn: int, seed: int) -> Ids:
        kept = self._turns.get(source)
        if kept is None or kept[0] != (turn, seed):
            key = np.random.SeedSequence((seed, source, turn, 1))
            random = np.random.Generator(np.random.SFC64(key))
            kept = self._turns[source] = ((turn, seed), random.permutation(self.members(source)))
        return kept[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_turns": {}}


def mixed(
    members: Members, weights: Tensor, length: int, before: Ids, *, seed: int, at: tuple[int, int]
) -> Ids:
    """``length`` draws by ``weights``: (length,) ids of samples.

    weights: (D,) float64; before: (D,), how many draws of each source came so far; ``at``: the
    epoch and the place in it, which with the seed decide the order. Counts are exact (largest
    remainder), and a source's draws are spread over the whole length, one at a random place of
    each of as many equal parts: every stretch of the plan has nearly its share of each source.
    Raises RequestError if a source of positive weight has no samples.
    """
    empty = [i for i, w in enumerate(weights.tolist()) if w > 0 and not members.sizes[i]]
    if empty:
        raise RequestError(
            f"the sources {empty} have weight and no samples; give them weight 0, or samples"
        )
    counts = allocate(length, weights).tolist()
    random = draw.generator(seed, at[0] * 1_000_003 + at[1])
    ids, keys = [], []
    for source, count in enumerate(counts):
        ids.append(members.through(source, int(before[source]), count, seed))
        keys.append((np.arange(count) + random.random(count)) / max(1, count))
    order = np.argsort(np.concatenate(keys), kind="stable")
    return np.concatenate(ids)[order]


def tensor(index: Ids) -> Tensor:
    """As a plan holds it: (n,) int64."""
    return torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64))
