"""An open pool: its store, who is in the choice, and what is known beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, RunError, unknown
from sparing.pool import resuming
from sparing.pool.batch import whole
from sparing.pool.cleaning import NO_CLEANING, Cleaning
from sparing.pool.encoders import Encoder
from sparing.pool.encoders import encoder as encoder_of
from sparing.pool.intake import Intake
from sparing.pool.items import Drop, Item, Vectors
from sparing.pool.members import Members
from sparing.pool.memory import MemoryStore
from sparing.pool.neighbours import KINDS
from sparing.pool.recaption import Recaptions
from sparing.pool.store import Store

Ids = NDArray[np.int64]


class Opened:
    """What ``Growth`` stands on: opened and closed, changed as a whole or not, and looked at."""

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        encoder: str | Path | Encoder | Callable[[Tensor], Tensor],
        index: str = "auto",
        k: int = 4,
        published: bool = False,
        clean: Cleaning | bool = True,
        seed: int = 0,
    ) -> None:
        require_whole("k", k, 1)
        require_whole("seed", seed, 0)
        # a program may change its working directory
        self.path = None if path is None else Path(path).absolute()
        self.encoder = encoder_of(encoder)
        self.index, self.k, self.published, self.seed = index, k, published, seed
        if index not in KINDS:
            raise unknown("kind of index", index, KINDS)
        if isinstance(clean, bool):
            clean = Cleaning(copies=-1) if published else Cleaning() if clean else NO_CLEANING
        elif not isinstance(clean, Cleaning):
            raise RequestError(f"clean must be True, False or a Cleaning, got {clean!r}")
        self.clean = clean
        self._held: Any = None
        self._closed = False
        self._known: Members | None = None
        self._intake = Intake(clean, seed)
        self._written: NDArray[np.float32] = np.empty(0, np.float32)
        self._early: list[Drop] = []
        self._draws = 0
        self._queue: Recaptions | None = None
        if self.path is not None and self.path.exists() and not self.path.is_dir():
            raise RequestError(f"{self.path} is a file; a pool needs a directory")
        if self.path is not None and self.path.exists() and any(self.path.iterdir()):
            self._held = Store.open(self.path, write=True)
            try:
                self._check()
                _ = self._members  # what is not right is told now
            except BaseException:
                self._store.close()
                raise

    # ---- the store ---------------------------------------------------------------------------

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "published": self.published,
            "copies": self.clean.copies,
            "bits": self.clean.bits,
        }

    def _create(self, vectors: Vectors) -> None:
        dim, second = vectors.main.shape[1], vectors.second is not None
        if self.path is None:
            self._held = MemoryStore(dim, self.encoder.version, second)
        else:
            self._held = Store.create(
                self.path, dim=dim, encoder=self.encoder.version, second=second
            )

    def _check(self) -> None:
        made = self._store.settings["encoder"]
        if made != self.encoder.version:
            raise RequestError(
                f'the pool at {self.path} was made with the encoder "{made}", and this one is '
                f'"{self.encoder.version}": vectors of two encoders cannot be compared; give the '
                "first, or make a new pool"
            )

    @property
    def _members(self) -> Members:
        if self._known is None:
            store = self._store
            self._known = Members(
                store.settings["dim"],
                read=store.vectors,
                details=lambda ids: self._intake.details(store, ids),
                limit=self.clean.copies,
                bits=self.clean.bits,
                kind=self.index,
                second=store.settings["second"],
                k=self.k,
                frozen=self.published,
                seed=self.seed,
            )
            try:
                resuming.resume_(self._known, store, self.path, self._settings)
                self._intake = Intake(self.clean, self.seed)
                self._intake.recall(store, self.seed)
            except BaseException:
                self._known = None
                raise
        return self._known

    @contextmanager
    def _changing(self, note: str) -> Iterator[Any]:
        """One change of the store; what is known beside it is made anew if the change fails."""
        try:
            with self._store.together(note):
                yield self._store
        except BaseException:
            self._known = None
            raise

    def _opened(self) -> Any:
        if self._store is None:
            raise RequestError("the pool is empty; add items first")
        return self._store

    @property
    def _store(self) -> Any:
        """None before the first item."""
        if self._closed:
            place = "" if self.path is None else f" at {self.path}"
            raise RequestError(f"the pool{place} is closed; open it again with sparing.Growth")
        return self._held

    def close(self) -> None:
        """Save what makes opening quick, and let others write. A pool in memory is gone then."""
        held, known, queue = self._held, self._known, self._queue
        self._held = self._known = self._queue = None
        self._closed = True
        if queue is not None:
            queue.close()
        if held is not None:
            try:
                if self.path is not None and known is not None:
                    with suppress(RunError):  # a full disk, say: it all follows from the store
                        resuming.save(self.path, known, self._settings)
            finally:
                held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what is there -----------------------------------------------------------------------

    def __len__(self) -> int:
        """Items that are stored, kept or dropped."""
        return 0 if self._store is None else int(self._store.size)

    @property
    def ids(self) -> Ids:
        """The ids of all stored items in arrival order: (N,)."""
        found: Ids = np.empty(0, np.int64) if self._store is None else self._store.ids()
        return found

    @property
    def reasons(self) -> NDArray[Any]:
        """Why each is in the choice (0) or not, a position in REASONS: (N,)."""
        found: NDArray[Any] = np.empty(0, np.int8)
        return found if self._store is None else self._store.column("reason")

    def kept(self) -> Ids:
        """The ids of the items in the choice, in arrival order."""
        found: Ids = self.ids[self.reasons == 0]
        return found

    def items(self, ids: Any) -> list[Item]:
        """Stored items by id."""
        found: list[Item] = self._opened().items(whole(ids))
        return found

    def sources(self) -> dict[str, Any]:
        """Where each source goes on."""
        return {} if self._store is None else self._store.sources()
