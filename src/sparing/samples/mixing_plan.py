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
        self._turns: dict[tuple[int, int, int], Ids] = {}

    def members(self, source: int) -> Ids:
        """The samples of a source, ascending."""
        return self._order[self._first[source] : self._first[source + 1]]

    def counts(self, index: Ids) -> Ids:
        """How many of the samples ``index``, (n,), are of each source: (D,)."""
        return np.bincount(self.source_of[index], minlength=self.sizes.size).astype(np.int64)

    def through(self, source: int, start: int, count: int, seed: int) -> Ids:
        """The samples of a source at ``start`` and after in its row of permutations: (count,)."""
        if count <= 0:
            return np.zeros(0, np.int64)
        size = int(self.sizes[source])
        first, last = start // size, (start + count - 1) // size
        for key in [k for k in self._turns if k[0] == source and not first <= k[1] <= last]:
            del self._turns[key]  # the next look goes on from here: earlier ones never come again
        turns = [self._permutation(source, turn, seed) for turn in range(first, last + 1)]
        found = turns[0] if len(turns) == 1 else np.concatenate(turns)
        return found[start - first * size : start - first * size + count]

    def _permutation(self, source: int, turn: int, seed: int) -> Ids:
        key = (source, turn, seed)
        if key not in self._turns:
            random = np.random.Generator(
                np.random.SFC64(np.random.SeedSequence((seed, source, turn, 1)))
            )
            self._turns[key] = random.permutation(self.members(source))
        return self._turns[key]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_turns": {}}


@final
class Drawn:
    """How many draws of each source came: ``before``, (D,), and in the dealt part of a plan.

    The dealt part only grows while a plan is in use, and stays as it was: each look counts what is
    new in it.
    """

    def __init__(self, members: Members, before: Ids | None = None) -> None:
        self._members = members
        self.before = np.zeros_like(members.sizes) if before is None else before
        self._at, self._dealt = 0, np.zeros_like(members.sizes)

    def with_dealt_(self, dealt: Ids) -> Ids:
        """Those of earlier plans and of the part of this one that is dealt, (n,): (D,)."""
        if dealt.size < self._at:
            self._at, self._dealt = 0, np.zeros_like(self.before)
        self._dealt = self._dealt + self._members.counts(dealt[self._at :])
        self._at = dealt.size
        return self.before + self._dealt

    def close_(self, plan: Ids) -> None:
        """The whole plan came; the next look is at another."""
        self.before = self.before + self._members.counts(plan)
        self._at, self._dealt = 0, np.zeros_like(self.before)


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
    ids, keys, done = np.empty(length, np.int64), random.random(length), 0
    for source, count in enumerate(counts):
        part = slice(done, done + count)
        ids[part] = members.through(source, int(before[source]), count, seed)
        keys[part] += np.arange(count)
        keys[part] /= max(1, count)
        done += count
    # a source's keys ascend, so that the stable sort merges few runs
    found: Ids = ids[np.argsort(keys, kind="stable")]
    return found


def tensor(index: Ids) -> Tensor:
    """As a plan holds it: (n,) int64."""
    return torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64))
