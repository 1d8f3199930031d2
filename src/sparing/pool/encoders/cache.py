"""Vectors are made once: a bounded cache by content and encoder version, in memory or on disk."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_whole
from sparing.core.errors import RunError
from sparing.pool.encoders import Encoder, UnreadableError
from sparing.pool.items import Item, Vectors
from sparing.pool.one_table import opened, truncate_log

FORMAT: Final = 1
_TABLE: Final = (
    "CREATE TABLE IF NOT EXISTS vectors (number INTEGER PRIMARY KEY AUTOINCREMENT, "
    "hash BLOB NOT NULL, version TEXT NOT NULL, rows BLOB NOT NULL, "
    "UNIQUE (hash, version))"
)
_MANY: Final = 500
"""Values of one SQL statement; SQLite takes 999 and more."""


def fingerprint(item: Item) -> bytes:
    """16 bytes of blake2b of all that an encoder can see: image, text, tensor; not key or label."""
    made = hashlib.blake2b(digest_size=16)
    for name, part in (("image", item.image), ("text", _text(item))):
        if part is not None:
            made.update(f"{name} {len(part)} ".encode())
            made.update(part)
    if item.tensor is not None:
        made.update(f"tensor {item.tensor.dtype.str} {item.tensor.shape} ".encode())
        made.update(np.ascontiguousarray(item.tensor).view(np.uint8).data)
    return made.digest()


@final
class Cached:
    """An encoder that asks its cache first.

    path: a file, made if it is not there, which several processes may use at once; None keeps it in
    memory. entries: at most so many vectors are kept, and the ones that were made first go. hashes:
    what tells items apart, for a store that has its own content hash. A cache that cannot be
    written, on a full disk say, raises RunError; delete the file and nothing is lost but time.
    """

    def __init__(
        self,
        encoder: Encoder,
        path: str | Path | None = None,
        *,
        entries: int = 100_000,
        hashes: Callable[[Item], bytes] = fingerprint,
    ) -> None:
        require_whole("entries", entries, 1)
        self.encoder, self.path, self.entries = encoder, path, entries
        self.hits = self.misses = 0
        self._hashes = hashes
        self._open_: sqlite3.Connection | None = None
        self._process = os.getpid()

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def version(self) -> str:
        return self.encoder.version

    def __call__(self, items: Sequence[Item]) -> Vectors:
        """The encoder's vectors; items with equal content are encoded once.

        Raises UnreadableError as the encoder does; the others of its batch are then not kept.
        """
        if not items:
            return self.encoder(items)
        keys = [self._hashes(item) for item in items]
        known = self._look_up(keys)
        new = {key: at for at, key in reversed(list(enumerate(keys))) if key not in known}
        places = sorted(new.values())
        self.hits += len(items) - len(places)
        self.misses += len(places)
        if places:
            try:
                made = self.encoder([items[at] for at in places])
            except UnreadableError as error:
                why = {keys[places[at]]: text for at, text in error.details.items()}
                raise UnreadableError(
                    {at: why[k] for at, k in enumerate(keys) if k in why}
                ) from None
            fresh = {keys[at]: _packed(made, row) for row, at in enumerate(places)}
            self._keep(fresh)
            known.update(fresh)
        return _unpacked([known[key] for key in keys])

    def forget(self, hashes: Iterable[bytes]) -> int:
        """Vectors of these contents, of any encoder, are overwritten on the disk; how many were."""
        wanted = list(hashes)
        gone = 0
        with self._written() as db:
            for part in _parts(wanted):
                marks = ",".join("?" * len(part))
                gone += db.execute(f"DELETE FROM vectors WHERE hash IN ({marks})", part).rowcount
        if self.path is not None:
            truncate_log(self._db(), f"the cache of vectors {self.path}")
        return gone

    def forget_items(self, items: Iterable[Item]) -> int:
        """The same by what the items hold."""
        return self.forget([self._hashes(item) for item in items])

    def __len__(self) -> int:
        """How many vectors are kept, of all versions."""
        return int(self._db().execute("SELECT count(*) FROM vectors").fetchone()[0])

    def close(self) -> None:
        """Give the file back; the next call opens it again."""
        if self._open_ is not None:
            self._open_.close()
            self._open_ = None

    def __getstate__(self) -> dict[str, object]:
        """Pickles without its connection; what is kept in memory only stays behind."""
        return {**self.__dict__, "_open_": None}

    def _look_up(self, keys: list[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for part in _parts(list(dict.fromkeys(keys))):
            marks = ",".join("?" * len(part))
            rows = self._db().execute(
                f"SELECT hash, rows FROM vectors WHERE version = ? AND hash IN ({marks})",
                (self.version, *part),
            )
            found.update(rows.fetchall())
        return found

    def _keep(self, fresh: dict[bytes, bytes]) -> None:
        version = self.version
        with self._written() as db:
            db.executemany(
                "INSERT OR REPLACE INTO vectors (hash, version, rows) VALUES (?, ?, ?)",
                [(key, version, rows) for key, rows in fresh.items()],
            )
            over = int(db.execute("SELECT count(*) FROM vectors").fetchone()[0]) - self.entries
            if over > 0:
                db.execute(
                    "DELETE FROM vectors WHERE number IN "
                    "(SELECT number FROM vectors ORDER BY number LIMIT ?)",
                    (over,),
                )

    def _written(self) -> _Transaction:
        return _Transaction(self._db(), self.path)

    def _db(self) -> sqlite3.Connection:
        if self._open_ is None or (self.path is not None and self._process != os.getpid()):
            # a connection must not be used on the other side of a fork
            self._open_ = opened(self.path, "cache of vectors", FORMAT, _TABLE)
            self._open_.execute("PRAGMA synchronous = NORMAL")
            self._process = os.getpid()
        return self._open_


@final
class _Transaction:
    def __init__(self, db: sqlite3.Connection, path: str | Path | None) -> None:
        self.db, self.path = db, path

    def __enter__(self) -> sqlite3.Connection:
        self.db.__enter__()
        return self.db

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.db.__exit__(None if error is None else type(error), error, None)
        if isinstance(error, sqlite3.Error):
            raise RunError(
                f"the cache of vectors {self.path} cannot be written ({error}); free its disk or "
                "delete the file"
            ) from error


def _text(item: Item) -> bytes | None:
    return None if item.text is None else item.text.encode("utf-8", "surrogatepass")


def _packed(made: Vectors, row: int) -> bytes:
    parts = [made.main[row], *([] if made.second is None else [made.second[row]])]
    return bytes([len(parts)]) + np.stack(parts).astype("<f4").tobytes()


def _unpacked(held: list[bytes]) -> Vectors:
    """A batch has second vectors if any of its items had; the others repeat their first."""
    rows: list[NDArray[np.float32]] = [
        np.frombuffer(part, "<f4", offset=1).reshape(part[0], -1) for part in held
    ]
    main = np.stack([row[0] for row in rows]).astype(np.float32)
    if all(len(row) == 1 for row in rows):
        return Vectors(main=main)
    return Vectors(main=main, second=np.stack([row[-1] for row in rows]).astype(np.float32))


def _parts(values: list[bytes]) -> list[list[bytes]]:
    return [values[at : at + _MANY] for at in range(0, len(values), _MANY)]
