"""What the page of a pool draws of its vectors: a map of the items, and groups of near copies."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from sparing.pool.items import REASONS
from sparing.pool.sources.account import GROUP, nearness

if TYPE_CHECKING:
    from sparing.pool.store.view import Reading as AnyView

POINTS: Final = 2000
_GROUPS: Final = 6
_MEMBERS: Final = 6
STYLES: Final = {
    "kept": "c1",
    "near copy": "c2",
    "evicted": "c4",
    "label issue": "c3",
    "outlier": "c6",
    "misaligned": "c5",
}
"""Colours of the map by reason."""


def coverage(view: AnyView) -> dict[str, Any] | None:
    """Items, evenly over their arrival, in the two directions in which vectors differ most."""
    import torch

    from sparing.pool.training.grown import projected
    from sparing.run.report.charts import Line, chart

    places = np.unique(np.linspace(0, view.size - 1, min(view.size, POINTS)).astype(np.int64))
    if places.size < 3:
        return None
    vectors = view.vectors(view.ids()[places])
    known = np.isfinite(vectors).all(1)
    places, vectors = places[known], vectors[known]
    spread = float(vectors.astype(np.float64).var(0).sum())
    if places.size < 3 or spread <= 0:
        return None
    flat = projected(torch.from_numpy(np.array(vectors)))
    shares = flat.astype(np.float64).var(0) / spread
    reason = view.column("reason")[places]
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in STYLES}
    for (x, y), code in zip(flat.tolist(), reason.tolist(), strict=True):
        parts.setdefault(REASONS[code], []).append((x, y))
    shown = {name: part for name, part in parts.items() if part}
    told = ", ".join(f"{len(part):,} {name}" for name, part in shown.items())
    drawn = chart(
        "map",
        [
            Line(points=part, style=STYLES.get(name, "grid-dots"), dots=True)
            for name, part in shown.items()
        ],
        title=f"A map of {places.size:,} items",
        description=told,
        x_name=f"across: the first direction, {shares[0]:.0%} of the variance; "
        f"upwards: the second, {shares[1]:.0%}",
    )
    if drawn is None:
        return None
    return {
        "plot": drawn,
        "legend": [
            (name, STYLES.get(name, "grid-dots"), f"{len(p):,}") for name, p in shown.items()
        ],
        "shown": f"{places.size:,}",
        "all": f"{view.size:,}",
    }


def copies(view: AnyView) -> tuple[str, list[list[tuple[int, str]]]]:
    """(how many there are, in words; some groups): of each member its id and how near it is.

    A group's first stands for it, and has the group's title. Groups are taken evenly from
    the largest to the smallest.
    """
    if GROUP not in view.columns():
        return "", []
    found = view.column("reason") == REASONS.index("near copy")
    ids, owners = view.ids()[found], view.column(GROUP)[found].astype(np.int64)
    stands, counts = np.unique(owners, return_counts=True)
    if not stands.size:
        return "", []
    said = [f"{n:,} of {size:,}" for size, n in sorted(Counter((counts + 1).tolist()).items())[:6]]
    together = int(counts.sum()) + stands.size
    more = " and more" if np.unique(counts).size > len(said) else ""
    many = f"{stands.size:,} groups" if stands.size > 1 else "One group"
    words = (
        f"{many} of near copies, {together:,} items; one of each stands for the others. "
        f"Groups by their number of items: {', '.join(said)}{more}."
    )
    order = np.argsort(-counts, kind="stable")
    picked = order[np.unique(np.linspace(0, order.size - 1, _GROUPS).astype(int))]
    groups = [_members(view, int(stands[at]), ids[owners == stands[at]]) for at in picked.tolist()]
    return words, groups


def _members(view: AnyView, owner: int, ids: NDArray[np.int64]) -> list[tuple[int, str]]:
    shown = ids[np.unique(np.linspace(0, ids.size - 1, _MEMBERS - 1).astype(int))]
    near = {
        of.id: f"{of.distance:.4f} away" + (f", {of.bits} bits" if of.bits >= 0 else "")
        for of in nearness(view, shown)
    }
    words = (
        f"{ids.size + 1:,} items, {shown.size + 1} shown"
        if shown.size < ids.size
        else f"{ids.size + 1} items"
    )
    rest = [(int(i), near[int(i)]) for i in shown.tolist()]
    return [(owner, words), *rest]
