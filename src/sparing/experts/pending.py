"""Auxiliary losses that wait to be taken, kept so that a compiled pass needs not know how many.

A graph that reads a list is compiled for that list's length. Here it reads no more than which
object comes next: a ring of passes, each with a chain of what layers found in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from torch import Tensor

KEPT_PASSES = 16
"""Forward passes whose losses wait; those of a loop that never takes them must not pile up."""


@final
class _Found:
    """The losses of one call, and what was found before it; the first of a chain has none."""

    def __init__(self, losses: dict[str, Tensor], added: Tensor | None, before: _Found | None):
        self.losses, self.added, self.before = losses, added, before


NOTHING = _Found({}, None, None)


@final
class _Pass:
    def __init__(self, following: _Pass | None) -> None:
        self.following = self if following is None else following
        self.found = NOTHING


@final
class Pending:
    """The losses of a layer's calls in the latest ``KEPT_PASSES`` forward passes of its model."""

    def __init__(self) -> None:
        first = last = _Pass(None)
        for _ in range(KEPT_PASSES - 1):
            first = _Pass(first)
        last.following = first
        self.current = last

    def begin(self) -> None:
        """A forward pass of the model begins: the oldest pass is forgotten."""
        self.current = self.current.following
        self.current.found = NOTHING

    def add(self, losses: dict[str, Tensor], added: Tensor | None) -> None:
        """One call's losses by name; ``added``: () bool, whether they count, or None if so."""
        self.current.found = _Found(losses, added, self.current.found)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """The losses, in the order of the calls."""
        one = self.current
        for _ in range(KEPT_PASSES):
            one = one.following  # the oldest pass first, the current one last
            chain, found = [], one.found
            while found.before is not None:
                chain.append((found.losses, found.added))
                found = found.before
            yield from reversed(chain)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def take(self) -> list[dict[str, Tensor]]:
        """The losses that count, in the order of the calls; none wait afterwards."""
        # one that does not is a compiled pass that was a checkpoint's recomputation
        taken = [losses for losses, added in self if added is None or bool(added)]
        for _ in range(KEPT_PASSES):
            self.begin()
        return taken
