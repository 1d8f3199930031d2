"""What a report shows of a training set that was grown, as plain data."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sparing.pool.items import REASONS
from sparing.pool.training.grown import Grown

SHOWN: Final = 16
POINTS: Final = 1500
TENTHS: Final = 10
MOST: Final = 200_000
"""Samples up to which a page holds what became of each."""


def add(found: dict[str, Any], grown: Grown, trained: NDArray[np.bool_]) -> dict[str, Any]:
    """``found``, of the plans, with the groups of pictures and the key ``growth``.

    trained: (N,), what was trained on. ``growth``: {size, trained, names: REASONS, reasons:
    {reason: count}, tenths: [{gain, trained, dropped}] by arrival, points: [[x, y, place in
    REASONS, or -1 where clean and not trained on]], each: (up to ``MOST`` samples) {reasons: a
    digit a sample, trained: 0 or 1 a sample, copies: [ids]}}.
    """
    selection = found.get("selection")
    if selection is not None:
        # losses decide nothing here
        shown = {**selection, "by_difficulty": [], "groups": groups(grown, trained)}
        found = {**found, "selection": shown}
    return {**found, "growth": summary(grown, trained)}


def groups(grown: Grown, took: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Samples to look at: those of high gain, and those dropped for each reason."""
    trained = np.flatnonzero(took)
    best = trained[np.argsort(-grown.gains[trained], kind="stable")][:SHOWN]
    clean = np.setdiff1d(grown.clean, trained, assume_unique=True)
    poor = clean[np.argsort(grown.gains[clean], kind="stable")][:SHOWN]
    shown = [("Kept, of the highest gain", best), ("Left out, of the lowest gain", poor)]
    for place, reason in enumerate(REASONS):
        members = np.flatnonzero(grown.reasons == place)
        if not place or not members.size:
            continue
        spread = members[np.arange(min(SHOWN, members.size)) * members.size
                         // min(SHOWN, members.size)]  # fmt: skip
        if reason in ("same content", "near copy"):  # beside what stands for it
            spread = spread[: SHOWN // 2]
            spread = np.stack([grown.group[spread], spread], axis=1).ravel()
            reason += ", each after the sample that stands for it"
        shown.append((f"Dropped: {reason}", spread))
    return [{"title": title, "index": index.tolist()} for title, index in shown if index.size]


def summary(grown: Grown, trained: NDArray[np.bool_]) -> dict[str, Any]:
    """The key ``growth`` of the page; see ``add``."""
    size = grown.gains.size
    counts = np.bincount(grown.reasons, minlength=len(REASONS))
    order = np.argsort(grown.arrived)
    tenths = []
    for part in np.array_split(order, TENTHS):
        gains = grown.gains[part]
        known = gains[~np.isnan(gains)]
        tenths.append(
            {
                "gain": float(known.mean()) if known.size else None,
                "trained": float(trained[part].mean()) if part.size else 0.0,
                "dropped": float((grown.reasons[part] != 0).mean()) if part.size else 0.0,
            }
        )
    some = np.arange(0, size, -(-size // POINTS))
    reason = grown.reasons[some].astype(np.int64)
    kind = np.where(trained[some] | (reason != 0), reason, -1)
    found: dict[str, Any] = {
        "size": size,
        "trained": int(trained.sum()),
        "names": list(REASONS),
        "reasons": {r: int(c) for r, c in zip(REASONS, counts, strict=True) if c},
        "tenths": tenths,
        "points": [
            [round(float(x), 4), round(float(y), 4), int(k)]
            for (x, y), k in zip(grown.view[some].tolist(), kind.tolist(), strict=True)
        ],
    }
    if size <= MOST:
        members, first = np.unique(grown.group, return_inverse=True)
        ordered = np.argsort(first, kind="stable")
        cuts = np.cumsum(np.bincount(first, minlength=members.size))[:-1]
        found["each"] = {
            "reasons": "".join(map(str, grown.reasons.tolist())),
            "trained": "".join(map(str, trained.astype(int).tolist())),
            "copies": [p.tolist() for p in np.split(ordered, cuts) if p.size > 1],
        }
    return found
