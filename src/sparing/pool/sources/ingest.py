"""Sources into a pool, so that it can be stopped at any point and goes on from there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, RunError
from sparing.pool.encoders import encode
from sparing.pool.items import Drop, Item
from sparing.pool.sources.source import Chunk, Source

if TYPE_CHECKING:
    from sparing.pool.growth import Growth

_TRIED: Final = 1024  # items that may be unreadable before the first that is not


@final
@dataclass(kw_only=True)
class Ingested:
    """What became of what was read: items and drops read, items stored, drops by reason."""

    read: int = 0
    stored: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sources: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "stored": self.stored,
            "dropped": {reason: n for reason, n in sorted(self.dropped.items()) if n},
            "sources": self.sources,
        }


def ingest(
    growth: Growth,
    sources: Sequence[Source],
    *,
    batch: int = 256,
    reread: bool = False,
    told: Callable[[Source, int, Ingested], None] | None = None,
) -> Ingested:
    """Add to the pool what the sources hold behind the cursors that it has of them.

    Each batch is stored with its cursor and its drops in one transaction. reread: from the start
    instead; what is stored already is found by its content. told: called after each batch, and at
    a source's end, with the source, how much of its ``total`` is read, and the counts so far.
    Raises RequestError, before anything is read, for a source that changed since; RunError if no
    item at all can be encoded.
    """
    require_whole("batch", batch, 1)
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"the source {name} is given twice; name it once")
    known = {} if reread else growth.sources()
    for source in sources:
        source.check(known.get(source.name))
    found = Ingested()
    waiting = _Waiting(growth)
    for source in sources:
        found.sources += 1
        for chunk in source.chunks(known.get(source.name), batch):
            found.read += len(chunk.items) + len(chunk.drops)
            if not waiting.done:
                waiting.take(source, chunk, found)
            else:
                _add(growth, source.name, chunk.items, chunk.drops, chunk.cursor, found)
            if told is not None:
                told(source, chunk.done, found)
        if told is not None:
            told(source, source.total, found)
    waiting.end()
    return found


def _add(
    growth: Growth,
    name: str,
    items: Sequence[Item],
    drops: Sequence[Drop],
    cursor: Any,
    found: Ingested,
) -> None:
    added = growth.add(items, source=name, cursor=cursor, drops=drops)
    found.stored += int((added.ids >= 0).sum())
    # an item whose key was used before is told of as "kept": it is no drop
    found.dropped.update(drop.reason for drop in added.drops if drop.reason != "kept")


@final
class _Waiting:
    """What came before the first item that can be encoded, without which there is no store."""

    def __init__(self, growth: Growth) -> None:
        self.growth = growth
        self.held: dict[str, tuple[list[Drop], Any]] = {}
        self.tried = 0
        self.done = bool(growth.sources())

    def take(self, source: Source, chunk: Chunk, found: Ingested) -> None:
        """Add a chunk with something that can be encoded, and all before it; hold another."""
        encoded = encode(self.growth.encoder, chunk.items)
        before = self.held.pop(source.name, ([], None))[0]
        if not len(encoded.rows):
            self.tried += len(chunk.items)
            self.held[source.name] = ([*before, *chunk.drops, *encoded.drops], chunk.cursor)
            if self.tried >= _TRIED:
                self.end()
            return
        self.done = True
        drops = [*before, *chunk.drops]
        _add(self.growth, source.name, chunk.items, drops, chunk.cursor, found)
        for name, (held, cursor) in self.held.items():
            _add(self.growth, name, [], held, cursor, found)
        self.held = {}

    def end(self) -> None:
        """Raise RunError if all that was read is held."""
        if self.done or not self.held:
            return
        drops = [drop for held, _ in self.held.values() for drop in held]
        told = "; ".join(f"{drop.key}: {_without(drop)}" for drop in drops[:3])
        raise RunError(
            f"none of {len(drops)} items can be read and encoded by "
            f'"{self.growth.encoder.version}", so nothing was stored; the first: {told}. Give '
            "another encoder (--encoder), or look at the files"
        )


def _without(drop: Drop) -> str:
    return drop.detail.removeprefix(f"{drop.key}: ")
