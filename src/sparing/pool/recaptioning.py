"""Better texts for misaligned pairs: who waits for one, who writes it, and what becomes of it.

Stored items never change: a text that is taken makes a new item beside the old one, which stays
misaligned, and the column ORIGIN of the new one names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.decisions import Decision, Example
from sparing.pool.encoders import Encoder
from sparing.pool.encoders.images import picture
from sparing.pool.intake import KEPT, MISALIGNED, Intake
from sparing.pool.items import IMAGE_HASH, Item, Vectors
from sparing.pool.members import Members
from sparing.pool.recaption import Recaptions, judge

FILE: Final = "recaptions.sqlite"
ORIGIN: Final = "recaption_of"
SOURCE: Final = "recaption"
NOTE: Final = "a new text for its image, in an item of its own"
OWN: Final = "pool-"
"""What the leases of a pool's own captioner begin with: a pool has one writer at a time."""
_EXAMPLES: Final = 12
_WORDS: Final = 80

Ids = NDArray[np.int64]
Captioner = Callable[[list[Any]], Sequence[str | None]]
Taken = tuple[NDArray[np.bool_], Ids, list[Example]]
"""Of offered texts (n,) which were taken; the ids of the new items; and examples."""


def column(store: Any, name: str, none: Any) -> NDArray[Any]:
    """A column of a store, ``none`` for each item where nobody has set it."""
    try:
        found: NDArray[Any] = store.column(name)
    except RequestError:
        return np.full(store.size, none)
    return found


def waiting(store: Any) -> Ids:
    """The misaligned items that arrived so; a new text that was taken back is none of them."""
    wrong = (store.column("reason") == MISALIGNED) & (column(store, ORIGIN, -1) < 0)
    found: Ids = store.ids()[wrong]
    return found


def caption(queue: Recaptions, store: Any, captioner: Captioner, count: int) -> int:
    """Have up to ``count`` items captioned and the texts offered; how many it were.

    captioner: a list of images, ``PIL.Image`` in RGB or the items' tensors, to as many texts, None
    or "" where it has none. If it fails nothing is lost, and its items wait again.
    """
    leases = queue.lease(count, by=OWN)
    if not leases:
        return 0
    try:
        items: list[Item] = store.items(np.array([lease.id for lease in leases], np.int64))
        shown = [item.tensor if item.image is None else picture(item.image) for item in items]
        texts = list(captioner(shown))
        if len(texts) != len(items):
            raise RequestError(
                f"the captioner gave {len(texts)} texts for {len(items)} images; expected one each"
            )
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise RequestError(
                    f"the captioner gave {type(text).__name__} in the place of a text; expected "
                    "str, or None where it has none"
                )
    except BaseException:
        queue.abandon(OWN)
        raise
    for lease, text in zip(leases, texts, strict=True):
        if text is None or not text.strip():
            queue.give_back(lease)
        else:
            queue.offer(lease, text)
    return len(leases)


def work(
    queue: Recaptions,
    store: Any,
    captioner: Captioner | None,
    take_: Callable[[Ids, list[str]], Taken],
    batch: int,
    limit: int | None,
) -> tuple[Ids, list[Example]]:
    """Have items captioned, up to ``limit`` of them, and judge after each batch what is offered.

    take_: (ids, texts) -> as ``take``, durably. Returns the ids of all new items, and examples.
    """
    queue.abandon(OWN)
    new, examples, done = [_NONE], list[Example](), 0
    while True:
        ids, texts = queue.offered(batch)  # also what others offered, or one that was killed
        if ids.size:
            taken, came, shown = take_(ids, texts)
            queue.settle(ids.tolist(), taken.tolist())
            new.append(came)
            examples += shown
            continue
        asked = batch if limit is None else min(batch, limit - done)
        count = 0 if captioner is None or not asked else caption(queue, store, captioner, asked)
        done += count
        if not count:
            return np.concatenate(new), examples


def take(
    store: Any,
    members: Members,
    intake: Intake,
    encoder: Encoder,
    ids: Ids,
    texts: Sequence[str],
) -> Taken:
    """Judge texts offered for items (n,), and let in those that are taken.

    Within a change of the store.
    """
    threshold = intake.threshold
    open_ = np.flatnonzero(np.isin(ids, waiting(store)))
    old = ids[open_]
    items = store.items(old)
    vectors = Vectors(main=store.vectors(old), second=store.vectors(old, "second"))
    found = judge(items, vectors, [texts[at] for at in open_.tolist()], encoder, threshold)
    rows = np.flatnonzero(found.taken)
    taken = np.zeros(ids.size, bool)
    taken[open_[rows]] = True
    if not rows.size:
        return taken, _NONE, []
    assert found.vectors.second is not None
    new = [found.items[row] for row in rows.tolist()]
    main, second = found.vectors.main[rows], found.vectors.second[rows]
    columns: dict[str, NDArray[Any]] = {ORIGIN: old[rows]}
    marks = None
    if intake.clean.bits >= 0 and any(item.image is not None for item in new):
        held = column(store, IMAGE_HASH, np.uint64(0)).astype(np.uint64)
        marks = held[np.searchsorted(store.ids(), old[rows])]
        columns[IMAGE_HASH] = marks
    added = store.append(new, Vectors(main=main, second=second), source=SOURCE, columns=columns)
    first = np.flatnonzero(added.ids >= 0)  # the others came before a kill, or with their source
    intake.take(
        store,
        members,
        added.ids[first],
        [new[at] for at in first],
        Vectors(main=main[first], second=second[first]),
        None if marks is None else marks[first],
        judged=True,
    )
    # it changes nothing, but is told in the old items' lineage with this change's note
    store.set_column("reason", old[rows], np.full(rows.size, MISALIGNED, np.int8))
    shown = [
        Example(
            id=int(added.ids[at]),
            other=int(old[rows[at]]),
            detail=f"{_short(new[at].text)} in the place of {_short(items[rows[at]].text)}",
        )
        for at in first[:_EXAMPLES].tolist()
    ]
    return taken, added.ids[first], shown


def decision(store: Any, new: Ids, examples: Sequence[Example], threshold: float) -> Decision:
    """What let in the new items that are in the choice; taken back they are misaligned."""
    here = new[store.column("reason")[np.searchsorted(store.ids(), new)] == KEPT]
    return Decision(
        reason="kept",
        ids=here,
        before=np.full(here.size, MISALIGNED, np.int64),
        detail=f"new texts whose cosine with the image is at least {threshold:.3f}",
        examples=tuple(examples[:_EXAMPLES]),
    )


def made_of(store: Any, ids: Ids) -> Ids:
    """``ids`` and those of the items made of them by a new text, ascending."""
    origin = column(store, ORIGIN, -1)
    return np.union1d(ids, store.ids()[np.isin(origin, ids)])


def _short(text: str | None) -> str:
    said = text or ""
    return f'"{said[:_WORDS]}{"..." if len(said) > _WORDS else ""}"'


_NONE: Final[Ids] = np.empty(0, np.int64)
