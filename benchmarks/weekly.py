"""Differences of the AUC between arms, paired by seed and week, with intervals and verdicts.

An AUC is the mean over positive rows of the share of negative rows below each. Summed by week, the
runs of an arm are a table (S seeds, W weeks) whose mean is the AUC, and so are differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparing.run.compare.bootstrap import documents_bootstrap
from sparing.run.compare.intervals import Interval, paired_interval

FINE, COARSE = 0.1, 0.3
"""Margins in points of AUC: 0.001 where the half-width allows it, else 0.003."""
LEVEL = 0.95


def by_week(placements: np.ndarray, week: np.ndarray) -> np.ndarray:
    """Of positive rows, (P,) percent and their weeks: (W,), whose mean is the mean of all rows."""
    weeks = np.unique(week)
    sums = np.array([placements[week == each].sum() for each in weeks])
    return np.asarray(sums * len(weeks) / len(placements))


def difference(
    arm: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]
) -> dict[str, Any] | None:
    """Arm less other on the seeds that both have, {seed: (W,)}; None without a common seed.

    Three intervals: by Student's t over seeds (if there are two or more), by the same over weeks,
    and by resampling both. The verdict takes the widest of the three at twice the error rate, as
    two one-sided tests do: "equivalent" where it lies within the margin, "different" where the
    widest at ``LEVEL`` leaves out 0, else "undecided". The margin is ``FINE`` if the half-width is
    below it, else ``COARSE``.
    """
    seeds = sorted(set(arm) & set(other))
    if not seeds:
        return None
    ours, theirs = (np.array([side[seed] for seed in seeds]) for side in (arm, other))
    wide = [_intervals(ours, theirs, level) for level in (LEVEL, 2 * LEVEL - 1)]
    reach = [max((i.high - i.low) / 2 for i in each.values()) for each in wide]
    estimate = float((ours - theirs).mean())
    margin = FINE if reach[1] < FINE else COARSE
    verdict = "undecided"
    if len(seeds) < 2:
        verdict = "none: one seed"
    elif abs(estimate) + reach[1] < margin:
        verdict = "equivalent"
    elif abs(estimate) > reach[0]:
        verdict = "different"
    return {
        "points": round(estimate, 4),
        "seeds": seeds,
        "by week": [round(float(x), 4) for x in (ours - theirs).mean(0)],
        "intervals": {name: [round(i.low, 4), round(i.high, 4)] for name, i in wide[0].items()},
        "half-width": round(reach[0], 4),
        "margin": margin,
        "verdict": verdict,
    }


def _intervals(ours: np.ndarray, theirs: np.ndarray, level: float) -> dict[str, Interval]:
    found = {}
    each = ours - theirs
    for name, values in (("seeds", each.mean(1)), ("weeks", each.mean(0))):
        if len(values) > 1:
            found[name] = paired_interval(values, level)
    found["seeds and weeks"] = documents_bootstrap(
        ours, theirs, level, domains=None, resamples=4000, generator=np.random.default_rng(0)
    )
    return found


def whose(clip: dict[str, Any] | None, schedule: dict[str, Any] | None) -> str:
    """What the data say of a gain: of the clip against clip off, and of clip off against another.

    ``clip``: CowClip less the same schedule without the clip; ``schedule``: that less the best
    other rule; both as ``difference`` gives them.
    """
    if clip is None or schedule is None:
        return "not measured"
    parts = []
    for told, found in (("clip", clip), ("schedule", schedule)):
        points, verdict = found["points"], found["verdict"]
        if verdict == "different":
            parts.append(
                f"the {told} {'gains' if points > 0 else 'loses'} {abs(points):.2f} points"
            )
        elif verdict == "equivalent":
            parts.append(f"the {told} changes less than {found['margin']:g} points")
        else:
            parts.append(f"what the {told} does ({points:+.2f} points) is not decided")
    shared = clip["verdict"] != "different" and schedule["verdict"] == "different"
    if shared and schedule["points"] > 0:
        parts.append("a gain that clip off shares is the schedule's")
    return "; ".join(parts)


def best(values: Mapping[str, float]) -> str:
    """The key of the highest finite value. Raises ValueError if there is none."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return max(finite, key=lambda name: finite[name])


def mean(values: Sequence[float]) -> float:
    """The mean; minus infinity of none, which is what a diverged arm has."""
    return float(np.mean(values)) if values else -math.inf
