"""What every index of neighbours offers, and the checks that all of them make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparing.core import state
from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, RunError

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

NOBODY = -1
"""The id in a place for which there is no neighbour; its distance is infinite."""


class Found(NamedTuple):
    """The nearest of each row that was asked for: the nearest first, equal ones by id.

    distances: (q, k) float32, 1 - cosine, infinite where there are fewer than k; ids: (q, k)
    int64, -1 there.
    """

    distances: Floats
    ids: Ids


class Pairs(NamedTuple):
    """Stored items and rows that are near to each other, by row and then by the item's place.

    stored: (p,) int64, ids; rows: (p,) int64, numbers of rows; distances: (p,) float32.
    """

    stored: Ids
    rows: Ids
    distances: Floats


class Joined(NamedTuple):
    """``Found``, and the other direction: which stored items have a new row within their radius."""

    distances: Floats
    ids: Ids
    pairs: Pairs


Radius = Floats | Callable[[Ids], Floats]
"""One of each stored item (N,) in the order of ``ids()``, or what gives them for ids (n,)."""


class Neighbours(ABC):
    """An index of vectors of length 1 under stable ids; distances are 1 - cosine, at least 0.

    All arrays are numpy's and on the CPU. ``dim`` is the number of a vector's entries.
    """

    kind: ClassVar[str]

    def __init__(self, dim: int) -> None:
        require_whole("dim", dim, 1)
        self.dim = dim

    @abstractmethod
    def __len__(self) -> int:
        """How many items are stored."""

    @abstractmethod
    def ids(self) -> Ids:
        """(N,) the stored ids in the order in which they came."""

    @abstractmethod
    def vectors(self, ids: Ids) -> Floats:
        """(n, d) what is stored of these. Raises RequestError for an unknown id."""

    @abstractmethod
    def add(self, ids: Ids, vectors: Floats) -> None:
        """Store n new items. ids: (n,), at least 0 and not stored yet; vectors: (n, d).

        Raises RequestError, and then stores none, for ids that are stored already or occur
        twice, and for vectors of another size, not finite or not of length 1.
        """

    @abstractmethod
    def update(self, ids: Ids, vectors: Floats) -> None:
        """Put other vectors in the place of stored ones; the order of ``ids()`` stays."""

    @abstractmethod
    def remove(self, ids: Ids) -> None:
        """Forget items, vectors and all. Raises RequestError, and removes none, for unknown ids."""

    @abstractmethod
    def query(self, vectors: Floats, k: int) -> Found:
        """The k nearest stored items of each row of vectors (q, d)."""

    @abstractmethod
    def join(self, vectors: Floats, k: int, radius: Radius) -> Joined:
        """``query``, and the pairs of a stored item and a row nearer to it than its radius.

        radius: -inf for an item about which nobody asks, +inf for one to which every row is near;
        a function of ids is asked for those that may be in a pair, some of them more than once.
        All pairs, unless the class says that it looks at candidates only.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Options and tensors, as ``restored`` takes them."""

    @classmethod
    @abstractmethod
    def restored(cls, state: Mapping[str, Any]) -> Neighbours:
        """The index whose ``state`` this was."""

    def save(self, path: str | Path) -> None:
        """Write the index to the directory ``path``: whole or not at all. Raises RunError."""
        state.save(path, self.state(), meta={"neighbours": self.kind, "format": 1})

    def outline(self) -> dict[str, Any] | None:
        """What is dear to make again, without the vectors; None where nothing is."""
        return None

    def resume_(self, outline: Mapping[str, Any], ids: Ids, read: Callable[[Ids], Floats]) -> bool:
        """Go on from ``outline`` while empty, with these items, ascending, vectors by ``read``.

        False, and still empty, if the outline is not that of just these items in an index of these
        options, or was made with another version of what made it.
        """
        return False

    # ---- checks -------------------------------------------------------------------------------

    def checked(self, vectors: Floats) -> Floats:
        """``vectors`` if they are (n, dim), finite and of length 1, else RequestError."""
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise RequestError(
                f"expected vectors of shape (n, {self.dim}), got {tuple(vectors.shape)}; "
                "an index holds what one encoder makes"
            )
        wide = np.ascontiguousarray(vectors, dtype=np.float32)
        squares = np.einsum("nd,nd->n", wide, wide)
        wrong = np.flatnonzero(~(np.abs(squares - 1) <= 4e-3))  # a NaN is not near 1, either
        if len(wrong):
            row, length = int(wrong[0]), float(np.sqrt(squares[wrong[0]]))
            raise RequestError(
                f"{len(wrong)} of {len(wide)} vectors are not of length 1, the first in row {row} "
                f"with length {length:g}; divide each row by its length, and look at the encoder "
                "if it is not finite or 0"
            )
        return wide

    def checked_pair(self, ids: Ids, vectors: Floats) -> tuple[Ids, Floats]:
        """Both, of equal length, the ids whole, at least 0 and each once; else RequestError."""
        ids, vectors = checked_ids(ids), self.checked(vectors)
        if len(ids) != len(vectors):
            raise RequestError(f"got {len(ids)} ids for {len(vectors)} vectors; give one for each")
        return ids, vectors

    def radii(self, radius: Radius) -> Floats:
        """(N,) in the order of ``ids()``. Raises RequestError for another size and for a NaN."""
        given = radius(self.ids()) if callable(radius) else radius
        wide = np.ascontiguousarray(given, dtype=np.float32)
        if wide.shape != (len(self),):
            raise RequestError(
                f"radius must have one entry for each of the {len(self)} stored items, in the "
                f"order of ids(); got shape {wide.shape}"
            )
        if np.isnan(wide).any():
            raise RequestError("a radius is NaN; give -inf for an item about which nobody asks")
        return wide


def checked_ids(ids: Ids) -> Ids:
    """``ids`` as (n,) int64, at least 0, each once; else RequestError."""
    given = np.asarray(ids)
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        raise RequestError(
            f"ids must be a vector of whole numbers, got {given.dtype} {given.shape}"
        )
    given = np.ascontiguousarray(given, dtype=np.int64)
    if len(given) and int(given.min()) < 0:
        raise RequestError(f"ids must be at least 0, got {int(given.min())}")
    rising = np.sort(given)
    twice = rising[1:][rising[1:] == rising[:-1]]
    if len(twice):
        raise RequestError(f"id {int(twice[0])} is given twice")
    return given


def no_pairs() -> Pairs:
    """None at all."""
    none = np.empty(0, dtype=np.int64)
    return Pairs(none, none, np.empty(0, dtype=np.float32))


def empty(q: int, k: int) -> Found:
    """``Found`` with nobody in it."""
    return Found(np.full((q, k), np.inf, dtype=np.float32), np.full((q, k), NOBODY, dtype=np.int64))


def read_state(path: str | Path) -> tuple[str, Mapping[str, Any]]:
    """What ``save`` wrote: the kind and its state. Raises RunError as ``core.state.read``."""
    saved = state.read(path)
    if not isinstance(saved.meta, dict) or "neighbours" not in saved.meta:
        raise RunError(f"{path} holds no index of neighbours; check the path")
    if saved.meta["format"] > 1:
        raise RunError(
            f"the index at {path} has format {saved.meta['format']}, and this version reads up to "
            '1; upgrade with "pip install --upgrade sparing", or build the index anew'
        )
    return str(saved.meta["neighbours"]), saved.tree
