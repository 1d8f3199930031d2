"""Exact while it is fast enough, inverted lists from the measured crossover on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, ClassVar, Final, final

from sparing.core.checks import require_whole
from sparing.pool.neighbours.exact import Exact
from sparing.pool.neighbours.inverted import Inverted
from sparing.pool.neighbours.protocol import Floats, Found, Ids, Joined, Neighbours, Radius

CROSSOVER: Final = 40_000
"""Items from which on ``Inverted`` takes in items faster than ``Exact``: see
benchmarks/neighbours.py."""
SLICE = 8192


@final
class Auto(Neighbours):
    """``Exact`` up to ``crossover`` items, then ``Inverted``; it does not go back.

    options: of ``Inverted``. The change takes a few seconds, once. Without the package "faiss" the
    search stays exact, and a warning says so. ``inner`` is the index that works now.
    """

    kind: ClassVar[str] = "auto"

    def __init__(self, dim: int, *, crossover: int = CROSSOVER, **options: Any) -> None:
        super().__init__(dim)
        require_whole("crossover", crossover, 1)
        self.crossover, self.options = crossover, options
        self._possible = find_spec("faiss") is not None
        if self._possible:
            Inverted(dim, **options)  # a wrong option is an error now
        self.inner: Neighbours = Exact(dim)

    def __len__(self) -> int:
        return len(self.inner)

    def ids(self) -> Ids:
        return self.inner.ids()

    def vectors(self, ids: Ids) -> Floats:
        return self.inner.vectors(ids)

    def add(self, ids: Ids, vectors: Floats) -> None:
        self.inner.add(ids, vectors)
        if len(self.inner) > self.crossover and isinstance(self.inner, Exact):
            self._change()

    def update(self, ids: Ids, vectors: Floats) -> None:
        self.inner.update(ids, vectors)

    def remove(self, ids: Ids) -> None:
        self.inner.remove(ids)

    def query(self, vectors: Floats, k: int) -> Found:
        return self.inner.query(vectors, k)

    def join(self, vectors: Floats, k: int, radius: Radius) -> Joined:
        return self.inner.join(vectors, k, radius)

    def _change(self) -> None:
        if not self._possible:
            self.crossover = 2 * len(self.inner)
            warnings.warn(
                f"exact search among {len(self.inner)} items takes time in proportion to their "
                'number; for inverted lists run: pip install "sparing[index]"',
                RuntimeWarning,
                stacklevel=4,
            )
            return
        old, ids = self.inner, self.inner.ids()
        fresh = self._lists(len(ids))
        for start in range(0, len(ids), SLICE):
            part = ids[start : start + SLICE]
            fresh.add(part, old.vectors(part))
        self.inner = fresh

    def _lists(self, count: int) -> Inverted:
        return Inverted(self.dim, **{"first": min(count, self.crossover), **self.options})

    def outline(self) -> dict[str, Any] | None:
        return self.inner.outline()

    def resume_(self, outline: Mapping[str, Any], ids: Ids, read: Callable[[Ids], Floats]) -> bool:
        if not self._possible:
            return False
        fresh = self._lists(len(ids))
        done = fresh.resume_(outline, ids, read)
        if done:
            self.inner = fresh
        return done

    def state(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "crossover": self.crossover,
            "options": {name: v for name, v in self.options.items() if name != "read"},
            "inner": self.inner.kind,
            "state": self.inner.state(),
        }

    @classmethod
    def restored(
        cls, state: Mapping[str, Any], *, read: Callable[[Ids], Floats] | None = None
    ) -> Auto:
        options = dict(state["options"]) | ({} if read is None else {"read": read})
        index = cls(state["dim"], crossover=state["crossover"], **options)
        if state["inner"] == Inverted.kind:
            index.inner = Inverted.restored(state["state"], read=read)
        else:
            index.inner = Exact.restored(state["state"])
        return index
