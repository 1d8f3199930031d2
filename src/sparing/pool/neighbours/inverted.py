"""Approximate search for large sets: inverted lists give candidates, their vectors rank them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

import numpy as np
import torch

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.pool.neighbours import ranking
from sparing.pool.neighbours.lists import TRAINED_ON, Lists
from sparing.pool.neighbours.packages import faiss
from sparing.pool.neighbours.probe import Probe, Recall
from sparing.pool.neighbours.protocol import (
    NOBODY,
    Floats,
    Found,
    Ids,
    Joined,
    Neighbours,
    Pairs,
    Radius,
    checked_ids,
    no_pairs,
)
from sparing.pool.neighbours.rows import Rows, fetch

SLICE = 16_384
"""Items that are coded in one go while lists are built anew beside the old ones."""
SPLITS = 64
EFFORT = 4
"""Factor up to which probes and candidates rise by themselves; they fall to half at most."""
EASE = 0.01
"""Recall above what is watched for that must be left where less is looked at."""
GROWN = 1.25
"""Factor of growth after which recall is measured again."""
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@final
class Inverted(Neighbours):
    """Lists of 4-bit codes (``lists.Lists``); the best ``candidates`` are ranked by their vectors.

    first: items from which on there are lists; before, every vector is looked at. limit: items
    past which a list is split. probes: lists that a row is looked for in. candidates: how
    many of a row's are ranked; pairs of ``join`` are among them: it finds most, not all. Both rise
    and fall by themselves (``mend_``). watch: the recall at 4 below which something is done, 0
    for never; see ``mend_``. vectors: "float16" or "float32", the own copy that candidates are
    ranked by (distances are right to some 1e-4, or 1e-6); float16 is half as large, and ranking
    takes twice as long. read: a function from ids to vectors in
    place of the own copy, such as one that reads them from a file.

    9 bytes an item besides the copy and the codes (d / 8 bytes and an id an item).
    """

    kind: ClassVar[str] = "inverted"

    def __init__(
        self,
        dim: int,
        *,
        first: int = 8192,
        limit: int = 1024,
        probes: int = 16,
        candidates: int = 192,
        watch: float = 0.96,
        vectors: str = "float32",
        read: Callable[[Ids], Floats] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dim)
        for name, value, least in (
            ("first", first, 1),
            ("limit", limit, 16),
            ("probes", probes, 1),
            ("candidates", candidates, 1),
            ("seed", seed, 0),
        ):
            require_whole(name, value, least)
        require_number("watch", watch, 0, 1)
        if vectors not in DTYPES:
            raise RequestError(f'vectors must be "float16" or "float32", got {vectors!r}')
        faiss()
        self.first, self.limit, self.probes, self.candidates = first, limit, probes, candidates
        self.watch, self.copy, self.seed = watch, vectors, seed
        self.read = read
        self.rows = Rows(dim, () if read else (DTYPES[vectors],), torch.device("cpu"))
        self.lists: Lists | None = None
        self.recall: Recall | None = None
        """What the last probe found."""
        self._most = [EFFORT * probes, EFFORT * candidates]
        self._coming: Lists | None = None
        self._moved = self._until = 0  # places that are in ``_coming``, and that shall be
        self._probed = self._built = 0  # sizes then
        self._fresh = 0  # items since lists were looked at

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self) -> Ids:
        return self.rows.ids()

    def vectors(self, ids: Ids) -> Floats:
        return self._vectors(np.asarray(ids, dtype=np.int64))

    def _vectors(self, ids: Ids) -> Floats:
        places = self.rows.places(ids)
        return fetch(self.rows.tensors[0], places) if self.read is None else self.read(ids)

    # ---- what is stored -----------------------------------------------------------------------

    def add(self, ids: Ids, vectors: Floats) -> None:
        ids, vectors = self.checked_pair(ids, vectors)
        self.rows.add(ids, vectors)
        if self.lists is None:
            if len(self) >= self.first:
                self.lists = self._trained()
                self._code(self.lists, self.ids())
                self._built, self._probed = len(self), 0
            return
        self.lists.add(ids, vectors)
        if self._coming is not None:
            self._coming.add(ids, vectors)
            self._move(SLICE)
        self._fresh += len(ids)
        if self._fresh >= self.limit // 4:
            self._even()
        if self.watch and len(self) > GROWN * self._probed:
            self.mend_()

    def update(self, ids: Ids, vectors: Floats) -> None:
        ids, vectors = self.checked_pair(ids, vectors)
        places = self.rows.places(ids)
        self.rows.write(places, vectors)
        for lists, mine in self._holding(places):
            lists.remove(ids[mine])
            lists.add(ids[mine], vectors[mine])

    def remove(self, ids: Ids) -> None:
        ids = checked_ids(ids)
        places = self.rows.places(ids)
        for lists, mine in self._holding(places):
            lists.remove(ids[mine])
        self.rows.remove(ids)
        kept = self.rows.close()
        if kept is not None:
            self._moved, self._until = np.searchsorted(kept, [self._moved, self._until]).tolist()
        if not len(self):
            self.lists = self._coming = None

    def _holding(self, places: Ids) -> list[tuple[Lists, Any]]:
        """The lists there are, and which of these places are in them."""
        found: list[tuple[Lists, Any]] = []
        if self.lists is not None:
            found.append((self.lists, slice(None)))
        if self._coming is not None:
            found.append((self._coming, (places < self._moved) | (places >= self._until)))
        return found

    def _trained(self) -> Lists:
        lists = Lists(self.dim, self.limit, self.seed)
        random = np.random.Generator(np.random.SFC64((self.seed, len(self))))
        held = self.ids()
        some = random.choice(held, min(len(held), TRAINED_ON), replace=False)
        lists.train(self._vectors(np.sort(some)))
        return lists

    def _code(self, lists: Lists, ids: Ids) -> None:
        for start in range(0, len(ids), SLICE):
            part = ids[start : start + SLICE]
            lists.add(part, self._vectors(part))
            while lists.split(self._vectors, SPLITS):
                pass

    def _even(self) -> None:
        self._fresh = 0
        for lists in (self.lists, self._coming):
            if lists is not None:
                lists.split(self._vectors, SPLITS)

    # ---- search -------------------------------------------------------------------------------

    def query(self, vectors: Floats, k: int) -> Found:
        require_whole("k", k, 0)
        vectors = self.checked(vectors)
        distances, ids = self._candidates(vectors, k)
        return ranking.best(distances, ids, k)

    def join(self, vectors: Floats, k: int, radius: Radius) -> Joined:
        require_whole("k", k, 0)
        vectors = self.checked(vectors)
        of = radius if callable(radius) else self._lookup(self.radii(radius))
        distances, ids = self._candidates(vectors, max(k, 1))
        who, far = ids.reshape(-1), distances.reshape(-1)
        some = np.flatnonzero(who != NOBODY)
        near = some[far[some] < of(who[some])] if len(some) else some
        who, far, rows = who[near], far[near], near // ids.shape[1] if len(near) else near
        order = np.lexsort((self.rows.find(who), rows))
        pairs = Pairs(who[order], rows[order], far[order]) if len(who) else no_pairs()
        return Joined(*ranking.best(distances, ids, k), pairs)

    def _lookup(self, radii: Floats) -> Callable[[Ids], Floats]:
        wide = self.rows.spread(radii)
        return lambda ids: wide[self.rows.find(ids)]

    def _candidates(self, vectors: Floats, k: int) -> tuple[Floats, Ids]:
        """(q, c) distances by the vectors and ids, in no order, infinite and -1 where fewer."""
        if self.lists is None:
            held = self.ids()
            return ranking.all_of(vectors, held, self._vectors, max(k, self.candidates))
        ids = self.lists.candidates(vectors, max(self.candidates, 4 * k), self.probes)
        if self.read is not None:
            return ranking.of_read(vectors, ids, self.read), ids
        places = self.rows.find(ids.reshape(-1)).reshape(ids.shape)
        ids[places < 0] = NOBODY
        return ranking.of_places(vectors, places, self.rows.tensors[0]), ids

    # ---- keeping it good ----------------------------------------------------------------------

    def mend_(self, *, limit: float | None = None, sample: int = 256) -> Recall:
        """Measure recall; if it is below ``limit`` (``watch``), look at more, else rebuild.

        Lists that are looked in, or candidates that are ranked, are doubled, whichever helps more,
        up to four times as many as at first. Where recall stays well above ``limit`` with half of
        one of them, they are halved, down to half of what they were at first. A rebuild trains new
        lists on what is stored now, and fills them a slice at each ``add``, beside the old ones,
        which answer until then; none is begun before the set has grown by half since the last.
        Returns the last recall that was measured.
        """
        limit = self.watch if limit is None else limit
        self._probed = len(self)
        seen = Probe(self, k=4, sample=sample, seed=self.seed)
        found = seen.recall()
        easy = found.near >= limit + EASE
        while found.near < limit and (harder := self._harder()):
            found, (self.probes, self.candidates) = self._best_of(seen, harder)
        while easy and (easier := self._easier()):
            now = self.probes, self.candidates
            less, (self.probes, self.candidates) = self._best_of(seen, easier)
            if less.near < limit + EASE:
                self.probes, self.candidates = now
                break
            found = less
        grown = len(self) >= 1.5 * self._built
        if found.near < limit and grown and self._coming is None and self.lists is not None:
            self.rebuild_()
        self.recall = found
        return found

    def _best_of(
        self, seen: Probe, options: list[tuple[int, int]]
    ) -> tuple[Recall, tuple[int, int]]:
        tried = []
        for option in options:
            self.probes, self.candidates = option
            tried.append((seen.recall(), option))
        return max(tried, key=lambda one: one[0].near)

    def _easier(self) -> list[tuple[int, int]]:
        """Probes and candidates with one of them halved, as far as they may fall."""
        if self.lists is None:
            return []
        p, c = self.probes, self.candidates
        least = [most // (2 * EFFORT) for most in self._most]
        options = [(p // 2, c), (p, c // 2)]
        return [(i, j) for i, j in options if i >= max(1, least[0]) and j >= max(1, least[1])]

    def _harder(self) -> list[tuple[int, int]]:
        """Probes and candidates with one of them doubled, as far as they may rise."""
        if self.lists is None:
            return []
        p, c = self.probes, self.candidates
        most = max(p, min(self._most[0], len(self.lists.centroids)))
        options = [(min(most, 2 * p), c), (p, min(max(c, self._most[1]), 2 * c))]
        return [option for option in options if option != (p, c)]

    def rebuild_(self, *, whole: bool = False) -> None:
        """Begin to build new lists beside the old ones; with ``whole``, also finish."""
        if self.lists is None:
            return
        self._coming = self._trained()
        self._moved, self._until = 0, self.rows.used
        if whole:
            self._move(self._until)

    def _move(self, count: int) -> None:
        assert self._coming is not None
        end = min(self._until, self._moved + count)
        part = self.rows.at[self._moved : end]
        self._code(self._coming, part[self.rows.alive[self._moved : end]])
        self._moved = end
        if end == self._until:
            self.lists, self._coming = self._coming, None
            self._built = len(self)

    # ---- state --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        if self._coming is not None:
            self._move(self._until)
        self.rows.close(now=True)
        held = self.lists.state() if self.lists is not None else None
        return {
            "options": {
                "dim": self.dim,
                "first": self.first,
                "limit": self.limit,
                "watch": self.watch,
                "vectors": self.copy,
                "seed": self.seed,
            },
            "effort": [self.probes, self.candidates, *self._most],
            "sizes": [self._probed, self._built],
            "ids": torch.from_numpy(self.ids()),
            "vectors": None if self.read else self.rows.tensors[0][: self.rows.used],
            "codes": torch.from_numpy(held["codes"]) if held else None,
            "stuck": held["stuck"] if held else [],
        }

    def outline(self) -> dict[str, Any] | None:
        if self.lists is None:
            return None
        held = self.lists.state()
        return {
            "made": self._made(),
            "effort": [self.probes, self.candidates, *self._most],
            "sizes": [self._probed, self._built],
            "codes": torch.from_numpy(held["codes"]),
            "stuck": held["stuck"],
        }

    def _made(self) -> dict[str, Any]:
        """What an outline must agree in to be gone on from."""
        with_ = faiss().__version__
        return {"outline": 1, "dim": self.dim, "limit": self.limit, "seed": self.seed, "by": with_}

    def resume_(self, outline: Mapping[str, Any], ids: Ids, read: Callable[[Ids], Floats]) -> bool:
        if outline.get("made") != self._made():
            return False
        lists = Lists(self.dim, self.limit, self.seed)
        try:
            lists.restore(outline["codes"].numpy(), outline["stuck"])
        except (RequestError, RuntimeError, AttributeError):  # FAISS's own error is RuntimeError
            return False
        if not np.array_equal(np.sort(lists.ids()), ids):
            return False
        for start in range(0, len(ids), SLICE):
            part = ids[start : start + SLICE]
            self.rows.add(*self.checked_pair(part, read(part)))
        self.lists = lists
        self.probes, self.candidates, *self._most = outline["effort"]
        self._probed, self._built = outline["sizes"]
        return True

    @classmethod
    def restored(
        cls, state: Mapping[str, Any], *, read: Callable[[Ids], Floats] | None = None
    ) -> Inverted:
        options = dict(state["options"])
        index = cls(options.pop("dim"), **options, read=read)
        if read is None and state["vectors"] is None:
            raise RequestError(
                "this index was saved without its vectors; give read=, the function that reads "
                "them by id"
            )
        index.probes, index.candidates, *index._most = state["effort"]
        index._probed, index._built = state["sizes"]
        ids = state["ids"].numpy()
        held = state["vectors"]
        index.rows.add(ids, np.empty((len(ids), index.dim), "f4") if read else held.float().numpy())
        if state["codes"] is not None:
            index.lists = Lists(index.dim, index.limit, index.seed)
            index.lists.restore(state["codes"].numpy(), state["stuck"])
        return index
