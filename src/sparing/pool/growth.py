"""A pool that grows: items come in a stream, and each is valued by what it adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown
from sparing.pool import judging, recaptioning, resuming
from sparing.pool.account import account
from sparing.pool.batch import as_items, require_source, whole
from sparing.pool.choice import Chosen, choose, generator, in_rounds
from sparing.pool.coverage import staying
from sparing.pool.decisions import Decision
from sparing.pool.encoders import encode
from sparing.pool.intake import KEPT, NEAR_COPY, regroup
from sparing.pool.items import IMAGE_HASH, REASONS, Added, Drop, Item, Vectors
from sparing.pool.members import COPY, STANDS
from sparing.pool.opened import Ids, Opened
from sparing.pool.recaption import Recaptions
from sparing.pool.recaptioning import Captioner
from sparing.pool.store.writing import as_json
from sparing.samples.gains import ByGain, GainProportional, TwoPhase

POLICIES: dict[str, type[ByGain]] = {"proportional": GainProportional, "two-phase": TwoPhase}


@final
class Growth(Opened):
    """A set of items that grows, in memory or in a directory.

    Args:
        path: a directory, made with the first batch if it is not there; None keeps all in memory.
        encoder: what makes vectors of items: a callable on a batch of tensors, (n, ...) to (n, d),
            an ``Encoder``, or the name of one.
        index: kind of neighbour search, "auto", "exact", "inverted" or "graph".
        k: neighbours that a gain is a mean over.
        published: the rule of the released code: gains as of arrival, never changed, and no copies
            taken out.
        clean: what is done before items are valued; False for nothing.
        seed: of what is drawn.

    One process writes to a directory at a time. Use it as a context manager, or ``close`` it::

        with sparing.Growth("pool", encoder=model.features) as pool:
            for batch in stream:
                pool.add(batch)
            chosen = pool.sample(10_000)
    """

    # ---- items -------------------------------------------------------------------------------

    def add(
        self,
        batch: Sequence[Item] | Tensor | NDArray[Any],
        *,
        labels: Sequence[int] | Tensor | NDArray[Any] | None = None,
        keys: Sequence[str] | None = None,
        source: str = "stream",
        cursor: Any = None,
        drops: Sequence[Drop] = (),
    ) -> Added:
        """Add items, or a batch of tensors (n, ...); tells each one's id and what was dropped.

        With a path all of it is on the disk when this returns, or nothing. cursor: where ``source``
        goes on after these items, and ``drops`` what it left out; both are stored with them. Near
        copies and misaligned pairs are stored, have ids, and are told among the drops.
        """
        start = 0 if self._store is None else self._store.size
        items = as_items(batch, labels, keys, f"{source}:", start)
        as_json(cursor)  # what cannot be stored is told before a store is made
        require_source(source, drops)
        if self._store is None and not items:
            self._early.extend(drops)
            return Added(ids=np.empty(0, np.int64), drops=tuple(drops))
        made = encode(self.encoder, items)
        left_out = (*drops, *made.drops)
        if self._store is None:
            if not len(made.rows):  # what vectors look like is not known yet
                self._early.extend(left_out)
                return Added(ids=np.full(len(items), -1, np.int64), drops=left_out)
            self._create(made.vectors)
        taken = [items[row] for row in made.rows.tolist()]
        if taken and self._store.settings["second"] and made.vectors.second is None:
            raise RequestError(
                "this pool holds pairs of image and text; each of its items needs both"
            )
        ids = np.full(len(items), -1, np.int64)
        with self._changing("add") as store:
            members = self._members
            if self._early or left_out:
                store.note_drops(source, [*self._early, *left_out], cursor)
            marks = self._intake.marks(taken)
            columns = None if marks is None else {IMAGE_HASH: marks}
            added = store.append(taken, made.vectors, source=source, cursor=cursor, columns=columns)
            store.flush()  # the disk works while neighbours are looked for
            ids[made.rows] = added.ids
            new = np.flatnonzero(added.ids >= 0)
            second = None if made.vectors.second is None else made.vectors.second[new]
            vectors = Vectors(main=made.vectors.main[new], second=second)
            told = self._intake.take(
                store,
                members,
                added.ids[new],
                [taken[i] for i in new],
                vectors,
                None if marks is None else marks[new],
            )
            if self.published and self.path is not None:
                resuming.note_arrivals(store, members, added.ids[new])
        self._early = []
        return Added(ids=ids, drops=(*left_out, *added.drops, *told))

    # ---- what they are worth -----------------------------------------------------------------

    def gains(self) -> NDArray[np.float32]:
        """The gain of every stored item in arrival order, NaN for those dropped: (N,)."""
        return np.empty(0, np.float32) if self._store is None else self._members.gains()

    def choose(self, n: int, *, rounds: int = 4) -> Chosen:
        """n items by gain, without replacement, with the probability that each had.

        The choice's ``places`` are positions in arrival order; each call draws anew. Items picked
        in one of the rounds lower the gain of their near ones in the next; with one round, and by
        the published rule, they do not.
        """
        require_whole("n", n, 0)
        self._opened()
        self._draws += 1
        random = generator(self.seed, self._draws)
        if rounds == 1 or self.published:
            return choose(self.gains(), n, random)
        gains, discount_ = self._members.discounting()
        return in_rounds(gains, n, random, rounds, discount_)

    def sample(self, n: int, *, rounds: int = 4) -> Ids:
        """The ids of n items drawn by gain, without replacement: (n,), ascending."""
        return self.ids[np.sort(self.choose(n, rounds=rounds).places)]

    def sampler(
        self,
        policy: Literal["proportional", "two-phase"] = "proportional",
        *,
        epochs: int | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> ByGain:
        """A torch Sampler of epochs by gain; it gives positions in ``kept()``.

        options: those of ``sparing.GainProportional``, ``share=`` for one, or ``sparing.TwoPhase``,
        whose epochs are as long as the gains make them.
        """
        if policy not in POLICIES:
            raise unknown("policy", policy, POLICIES)
        if policy == "two-phase" and {"share", "keep"} & options.keys():
            raise RequestError(
                "two-phase epochs are as long as the gains make them, and take no share; leave it "
                'out, or draw by "proportional"'
            )
        gains = self.gains()
        gains = gains[~np.isnan(gains)]
        if not gains.size:
            raise RequestError("the pool keeps no item; add some before asking for a sampler")
        return POLICIES[policy](
            size=gains.size,
            epochs=epochs,
            seed=self.seed if seed is None else seed,
            gains=torch.from_numpy(gains),
            **options,
        )

    # ---- what leaves -------------------------------------------------------------------------

    def evict(self, budget: int) -> Ids:
        """Keep at most ``budget`` items, so that what was covered stays so; the ids of the others.

        They stay in the store, as "evicted". See ``coverage``.
        """
        self._opened()
        members = self._members
        stays = staying(members, budget, self.seed)
        out: Ids = members.ids[(members.role == STANDS) & ~stays]
        self._drop(out, "evicted", f"a budget of {budget}")
        return out

    def _drop(self, ids: Ids, reason: str, note: str) -> None:
        self._decide(ids, np.full(ids.size, REASONS.index(reason)), note)

    def _decide(self, ids: Ids, reasons: NDArray[Any], note: str) -> None:
        """Give items (n,) these reasons (n,); those that come in may turn out to be copies."""
        if not ids.size:
            return
        comes = np.isin(reasons, (KEPT, NEAR_COPY))
        with self._changing(note) as store:
            members = self._members
            members.leave_(ids[~comes])
            changed = members.back_(ids[comes])
            copy = members.role[members.main.places(ids)] == COPY
            told = np.where(comes, np.where(copy, NEAR_COPY, KEPT), reasons).astype(np.int8)
            store.set_column("reason", ids, told, note=note)
            regroup(store, changed)

    def forget(self, ids: Any) -> None:
        """Take items away from everywhere: payload, vectors, neighbours, scores, snapshots, caches.

        What was made of them by a new text goes with them. The page goes too, since it may show
        them; ``sparing grow`` writes it anew.
        """
        store = self._opened()
        given = np.unique(whole(ids))
        store.items(given)  # an unknown id is an error before anything is done
        given = recaptioning.made_of(store, given)
        items = store.items(given)
        members = self._members
        if self.path is not None:
            resuming.discard(self.path)
        cached = getattr(self.encoder, "forget_items", None)
        if cached is not None:
            cached(items)
        if self._queue is not None or (self.path and (self.path / recaptioning.FILE).is_file()):
            self.recaptions.forget(given.tolist())
        try:
            changed = members.forget_(given)
            store.forget(given)
            with store.together("forget"):
                regroup(store, changed)
        except BaseException:
            self._known = None
            raise
        self._written = np.empty(0, np.float32)

    # ---- for the record ----------------------------------------------------------------------

    def snapshot(self, label: str = "") -> int:
        """Keep this moment, with its gains, readable for ever; its number."""
        store = self._opened()
        self._write_gains(store)
        number: int = store.snapshot(label)
        return number

    def _write_gains(self, store: Any) -> None:
        """Gains that have changed since they were last written, tagged by what valued them."""
        gains = self.gains()
        old = np.full(gains.size, np.nan, np.float32)
        old[: self._written.size] = self._written
        other = ~((gains == old) | (np.isnan(gains) & np.isnan(old)))
        rule = "published" if self.published else "expected"
        version = f"{self.encoder.version}, {rule}, k={self.k}"[-200:]
        if other.any():
            store.set_scores("gain", self.ids[other], gains[other], version=version)
        self._written = gains

    def find(self, reason: Literal["label issue", "outlier"], **options: Any) -> Decision:
        """Which kept items are likely labelled wrongly, or far from everything; changes nothing.

        options: those of ``judging``. Look at the decision's examples, then ``apply`` it.
        """
        return judging.find(reason, self._opened(), self._members, **options)

    def apply(self, decision: Decision) -> None:
        """Leave a decision's items out of the choice; they stay in the store."""
        self._drop(decision.ids, decision.reason, decision.detail)

    def undo(self, decision: Decision) -> None:
        """Take a decision back, but for items that a later one gave another reason."""
        store = self._opened()
        known = np.isin(decision.ids, self.ids)  # others were forgotten
        held = replace(decision, ids=decision.ids[known], before=decision.before[known])
        ids, before = held.undone(self.reasons[np.searchsorted(store.ids(), held.ids)])
        self._decide(ids, before, "taken back")

    @property
    def recaptions(self) -> Recaptions:
        """The queue of misaligned pairs that wait for a better text; all of them are in it.

        With a path it is a file, ``recaptions.sqlite``, that captioners in other processes may
        open; the texts that they offer are judged by the next ``recaption``.
        """
        store = self._opened()
        if self._queue is None:
            path = None if self.path is None else self.path / recaptioning.FILE
            self._queue = Recaptions(path)
        self._queue.put(recaptioning.waiting(store).tolist())
        return self._queue

    def recaption(
        self, captioner: Captioner | None = None, *, batch: int = 64, limit: int | None = None
    ) -> Decision:
        """Let misaligned pairs in with new texts that reach the threshold where the old do not.

        captioner: a list of images (``PIL.Image`` in RGB, or the items' tensors) to as many texts,
        None where it has none; called with ``batch`` images until nobody waits, or ``limit`` were
        asked for. Without one the texts that others offered are judged. What was done is durable
        after each batch, and the next call goes on from there.

        A text that is taken makes a new item; the old one stays in the store as it was. ``undo``
        of the decision takes the new ones out.
        """
        require_whole("batch", batch, 1)
        queue = self.recaptions
        _ = self._members  # which calibrates the threshold
        threshold = self._intake.threshold

        def take(ids: Ids, texts: list[str]) -> recaptioning.Taken:
            with self._changing(recaptioning.NOTE) as store:
                return recaptioning.take(
                    store, self._members, self._intake, self.encoder, ids, texts
                )

        if limit is not None:
            require_whole("limit", limit, 0)
        new, examples = recaptioning.work(queue, self._store, captioner, take, batch, limit)
        return recaptioning.decision(self._store, new, examples, threshold)

    def report(self) -> dict[str, Any]:
        """Items stored, kept, dropped by reason; copies by group; mean gain by tenth of arrival."""
        return account(self._store, None if self._store is None else self._members)
