"""Texts made anew: a queue of items that wait for a better caption, and the rule that judges it.

The captioner is elsewhere: it leases items, writes texts and offers them; a text that reaches the
threshold replaces one that did not (the released rule of Qin et al. 2024).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.pool.alignment import cosines
from sparing.pool.encoders import Encoder, encode
from sparing.pool.items import Item, Vectors
from sparing.pool.one_table import opened, truncate_log

FORMAT: Final = 1
_TABLE: Final = (
    "CREATE TABLE IF NOT EXISTS waiting (number INTEGER PRIMARY KEY AUTOINCREMENT, "
    "id INTEGER NOT NULL UNIQUE, state INTEGER NOT NULL, token TEXT, until REAL, "
    "attempt INTEGER NOT NULL DEFAULT 0, text TEXT)"
)
_WAITING, _LEASED, _OFFERED, _TAKEN, _REFUSED, _GIVEN_UP = range(6)
STATES: Final = ("waiting", "leased", "offered", "taken", "refused", "given up")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """An item to caption: its id, the token to offer a text with, and which try it is, from 1."""

    id: int
    token: str
    attempt: int


@final
class Recaptions:
    """The queue, in a file or, with None, in memory; several processes may use one file.

    seconds: how long a lease lasts; an item whose captioner died is then leased again, at most
    ``attempts`` times in all. Nothing here reads items: ids name them.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        seconds: float = 600.0,
        attempts: int = 3,
        clock: Callable[[], float] = time.time,
    ) -> None:
        require_number("seconds", seconds, 0.0)
        require_whole("attempts", attempts, 1)
        self.seconds, self.attempts, self._clock = seconds, attempts, clock
        self._db = opened(path, "queue of captions", FORMAT, _TABLE)

    def put(self, ids: Iterable[int]) -> int:
        """Ask for texts of these items; how many were not in the queue yet, in any state."""
        with self._db as db:
            before = db.total_changes
            db.executemany(
                "INSERT OR IGNORE INTO waiting (id, state) VALUES (?, ?)",
                [(int(i), _WAITING) for i in ids],
            )
            return db.total_changes - before

    def lease(self, count: int, by: str = "") -> list[Lease]:
        """Up to ``count`` items to caption, those that wait longest first; none twice at once.

        by: what their tokens begin with, for ``abandon``.
        """
        require_whole("count", count, 1)
        now = self._clock()
        with self._db as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute(
                "UPDATE waiting SET state = ?, token = NULL WHERE state = ? AND until <= ? "
                "AND attempt >= ?",
                (_GIVEN_UP, _LEASED, now, self.attempts),
            )
            rows = db.execute(
                "SELECT id, attempt FROM waiting WHERE state = ? OR (state = ? AND until <= ?) "
                "ORDER BY number LIMIT ?",
                (_WAITING, _LEASED, now, count),
            ).fetchall()
            made = [Lease(id=i, token=by + uuid.uuid4().hex, attempt=n + 1) for i, n in rows]
            db.executemany(
                "UPDATE waiting SET state = ?, token = ?, until = ?, attempt = ? WHERE id = ?",
                [(_LEASED, m.token, now + self.seconds, m.attempt, m.id) for m in made],
            )
        return made

    def offer(self, lease: Lease, text: str) -> bool:
        """Hand in a text; False where the lease has passed to another, or the item is gone.

        Raises RequestError for an empty text: give the item back instead.
        """
        if not text.strip():
            raise RequestError(f"the text offered for item {lease.id} is empty; use give_back")
        return self._close(lease, _OFFERED, text)

    def give_back(self, lease: Lease) -> bool:
        """The item cannot be captioned now; it waits again, or is given up after its last try."""
        last = lease.attempt >= self.attempts
        return self._close(lease, _GIVEN_UP if last else _WAITING, None)

    def abandon(self, by: str) -> int:
        """All items that are leased ``by`` somebody wait again, as if they had not been; how many.

        For one who knows that nobody works on them: after a kill, say.
        """
        with self._db as db:
            done = db.execute(
                "UPDATE waiting SET state = ?, token = NULL, attempt = attempt - 1 "
                "WHERE state = ? AND substr(token, 1, ?) = ?",
                (_WAITING, _LEASED, len(by), by),
            )
            return done.rowcount

    def offered(self, count: int = 256) -> tuple[NDArray[np.int64], list[str]]:
        """(ids, texts) that are to be judged, the first offered first."""
        rows = self._db.execute(
            "SELECT id, text FROM waiting WHERE state = ? ORDER BY number LIMIT ?",
            (_OFFERED, count),
        ).fetchall()
        return np.array([row[0] for row in rows], np.int64), [row[1] for row in rows]

    def settle(self, ids: Iterable[int], taken: Iterable[Any]) -> None:
        """What became of the offered texts; their wording is dropped here."""
        states = [(_TAKEN if yes else _REFUSED, int(i)) for i, yes in zip(ids, taken, strict=True)]
        with self._db as db:
            db.executemany(
                f"UPDATE waiting SET state = ?, text = NULL WHERE id = ? AND state = {_OFFERED}",
                states,
            )

    def forget(self, ids: Iterable[int]) -> None:
        """The items and their texts leave the queue, overwritten on the disk."""
        with self._db as db:
            db.executemany("DELETE FROM waiting WHERE id = ?", [(int(i),) for i in ids])
        truncate_log(self._db, "the queue of captions")

    def counts(self) -> dict[str, int]:
        """How many items are in each state."""
        rows = self._db.execute("SELECT state, count(*) FROM waiting GROUP BY state").fetchall()
        return {STATES[state]: int(n) for state, n in sorted(rows)}

    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    def _close(self, lease: Lease, state: int, text: str | None) -> bool:
        with self._db as db:
            done = db.execute(
                "UPDATE waiting SET state = ?, text = ?, token = NULL "
                "WHERE id = ? AND token = ? AND state = ?",
                (state, text, lease.id, lease.token, _LEASED),
            )
            return done.rowcount == 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """taken (n,) bool; items with the new text where it was taken, and their vectors."""

    taken: NDArray[np.bool_]
    items: tuple[Item, ...]
    vectors: Vectors


def judge(
    items: Sequence[Item],
    vectors: Vectors,
    texts: Sequence[str],
    encoder: Encoder,
    threshold: float,
) -> Judged:
    """The released rule: a new text replaces one below the threshold if it reaches it itself.

    vectors: the items' now, main of images and second of texts, (n, d) each. A text that already
    fits stays, however much better the new one is. Raises RequestError for items that are no pairs.
    """
    if len(texts) != len(items) or len(vectors.main) != len(items):
        raise RequestError(
            f"{len(items)} items, {len(vectors.main)} vectors and {len(texts)} texts; expected one "
            "of each an item"
        )
    low = np.flatnonzero(cosines(vectors) < threshold)
    taken = np.zeros(len(items), bool)
    main, second = vectors.main.copy(), np.array(vectors.second)
    again = [replace(items[int(at)], text=texts[int(at)]) for at in low]
    made = encode(encoder, again)
    if len(made.rows) and made.vectors.second is None:
        raise RequestError(f"the encoder {encoder.version} makes no vectors of texts; take another")
    if made.vectors.second is not None:
        rows = low[made.rows]
        fits = np.einsum("nd,nd->n", main[rows], made.vectors.second) >= threshold
        taken[rows[fits]] = True
        second[rows[fits]] = made.vectors.second[fits]
    kept = tuple(
        replace(item, text=texts[at]) if taken[at] else item for at, item in enumerate(items)
    )
    return Judged(taken=taken, items=kept, vectors=Vectors(main=main, second=second))
