"""What makes vectors of items, by which they are neighbours: the protocol, and encoders by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, final, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError, unknown
from sparing.pool.items import Drop, Item, Vectors

NAMES: Final = ("pixels", "minilm", "efficientnet-lite0")
_SHORTEST: Final = 1e-12
"""A row shorter than this has no direction."""


@runtime_checkable
class Encoder(Protocol):
    """Makes vectors of items; equal versions give equal vectors for equal items.

    ``dim`` is the length of a row. A call raises UnreadableError for items that it cannot read,
    and RequestError for a request that no item could fulfil.
    """

    @property
    def dim(self) -> int: ...

    @property
    def version(self) -> str: ...

    def __call__(self, items: Sequence[Item]) -> Vectors: ...


@final
class UnreadableError(RequestError):
    """Some items of a batch cannot be read: ``details`` tells of each position why."""

    def __init__(self, details: Mapping[int, str]) -> None:
        self.details = dict(details)
        first = next(iter(self.details.values()), "")
        super().__init__(f"{len(self.details)} items cannot be read: {first}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A batch after ``encode``: ``vectors`` of the items at ``rows`` (m,), the others' drops."""

    vectors: Vectors
    rows: NDArray[np.int64]
    drops: tuple[Drop, ...]


def encode(encoder: Encoder, items: Sequence[Item]) -> Encoded:
    """The vectors of the items that can be read; the others become drops, "unreadable".

    Rows with NaN or infinity, and rows of zeros, which have no direction, are drops too. Raises
    RequestError where the encoder gives another number or size of rows than it should.
    """
    rows = np.arange(len(items), dtype=np.int64)
    drops: dict[int, str] = {}
    vectors: Vectors | None = None
    while vectors is None and len(rows):
        try:
            vectors = encoder([items[row] for row in rows.tolist()])
        except UnreadableError as error:
            bad = sorted(error.details)
            if not bad or bad[0] < 0 or bad[-1] >= len(rows):
                raise
            drops.update({int(rows[at]): error.details[at] for at in bad})
            rows = np.delete(rows, bad)
    if vectors is None:
        empty = np.zeros((0, encoder.dim), np.float32)
        return Encoded(vectors=Vectors(main=empty), rows=rows, drops=_drops(items, drops))
    main, wrong = unit(_rows(vectors.main, len(rows), encoder))
    second = None
    if vectors.second is not None:
        second, also = unit(_rows(vectors.second, len(rows), encoder))
        wrong = {**also, **wrong}
    if not wrong:
        made = Vectors(main=main, second=second)
        return Encoded(vectors=made, rows=rows, drops=_drops(items, drops))
    drops.update({int(rows[at]): f"the encoder gives {what}" for at, what in wrong.items()})
    keep = np.setdiff1d(np.arange(len(rows)), np.fromiter(wrong, np.int64, len(wrong)))
    kept = Vectors(main=main[keep], second=None if second is None else second[keep])
    return Encoded(vectors=kept, rows=rows[keep], drops=_drops(items, drops))


def unit(rows: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float32], dict[int, str]]:
    """(rows (n, d) at length 1, float32; what is wrong with each row that has no direction)."""
    wide = np.asarray(rows, dtype=np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide, dtype=np.float64))
    finite, long = np.isfinite(lengths), lengths > _SHORTEST
    made = np.empty(wide.shape, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        by = np.where(finite & long, lengths, 1.0)[:, None]
        # in float64 only what float32 does not hold
        inside = bool((by < np.finfo(np.float32).max).all())
        np.divide(wide, by.astype(np.float32) if inside else by, out=made, casting="same_kind")
    wrong = {int(at): "a vector with NaN or infinity" for at in np.flatnonzero(~finite)}
    wrong |= {int(at): "a vector of zeros" for at in np.flatnonzero(finite & ~long)}
    return made, wrong


def in_batches(
    items: Sequence[Item],
    size: int,
    one: Callable[[Sequence[Item]], NDArray[np.float32]],
    dim: int,
) -> NDArray[np.float32]:
    """``one(part) -> (len(part), d)`` on parts of at most ``size`` items, put together: (n, d).

    What cannot be read is told of all parts at once; ``dim`` is the width of nothing.
    """
    found: list[NDArray[np.float32]] = []
    details: dict[int, str] = {}
    for start in range(0, len(items), size):
        try:
            found.append(one(items[start : start + size]))
        except UnreadableError as error:
            details.update({start + at: why for at, why in error.details.items()})
    if details:
        raise UnreadableError(details)
    return np.concatenate(found) if found else np.zeros((0, dim), np.float32)


def encoder(
    given: str | Path | Encoder | Callable[..., Any],
    *,
    device: str = "cpu",
    cache: str | Path | None = None,
    **options: Any,
) -> Encoder:
    """An encoder by its name, by the folder of a Hugging Face model, or around a callable.

    given: "pixels" (needs nothing), "minilm", "efficientnet-lite0", a folder with a config.json,
    an Encoder, or a callable on a batch of tensors (see ``sparing.pool.encoders.function``).
    cache: a file where vectors are kept by their items' content, see ``cache.Cached``.
    Raises RequestError for an unknown name, naming the nearest, or a missing package.
    """
    if cache is not None:
        from sparing.pool.encoders.cache import Cached

        return Cached(encoder(given, device=device, **options), cache)
    if isinstance(given, str | Path):
        return _named(given, device, options)
    if isinstance(given, Encoder):
        return given
    if callable(given):
        from sparing.pool.encoders.function import Function

        return Function(given, **options)
    raise RequestError(
        f"encoder must be a name ({', '.join(NAMES)}), a folder or a callable, got {given!r}"
    )


def _named(given: str | Path, device: str, options: dict[str, Any]) -> Encoder:
    if given == "pixels":
        from sparing.pool.encoders.pixels import Pixels

        return Pixels(**options)
    if given == "efficientnet-lite0":
        from sparing.pool.encoders.efficientnet import efficientnet_lite0

        return efficientnet_lite0(device=device, **options)
    if given == "minilm" or (Path(given).expanduser() / "config.json").is_file():
        from sparing.pool.encoders.hf import hugging_face

        return hugging_face(given, device=device, **options)
    if Path(given).expanduser().is_dir():
        raise RequestError(
            f"there is no encoder in {given}: no config.json; give the folder of a "
            "model in Hugging Face's format"
        )
    raise unknown("encoder", str(given), NAMES)


def _rows(rows: NDArray[np.float32], count: int, encoder: Encoder) -> NDArray[np.float32]:
    found = np.asarray(rows)
    if found.shape != (count, encoder.dim):
        raise RequestError(
            f"the encoder {encoder.version} gave vectors of shape {found.shape} for {count} items; "
            f"expected ({count}, {encoder.dim}): a row for each item, all of one size"
        )
    return found


def _drops(items: Sequence[Item], details: Mapping[int, str]) -> tuple[Drop, ...]:
    return tuple(
        Drop(key=items[at].key, reason="unreadable", detail=details[at]) for at in sorted(details)
    )
