"""What a budget keeps of a set that grew: who came first or last, and who has near copies.

    python benchmarks/growth_order.py [--seeds 4]

300 clusters of 20 items, of which 300 items have 7 near copies each; 30 % may stay. Beside the
gain that is the same for all orders of arrival: the released rule, whose gains are those of
arrival, and the same rule with all gains refreshed in the end. Items arrive shuffled; sorted by
cluster; one of each cluster in turn, which tells the released rule least about later ones; and
shuffled with 20 % duplicates instead of the groups of copies. The clusters are alike, so no tenth
of the arrivals is worth more than another: the ratio of what is kept of the first and of the last
tenth should be 1. A group is covered if any of its items stays.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from record import write
from sparing.pool.choice import choose, generator
from sparing.pool.coverage import staying
from sparing.pool.neighbourhood import Neighbourhood
from sparing.pool.neighbours import neighbours

CLUSTERS, EACH, DIM = 300, 20, 64
COPIED, COPIES, JITTER = 300, 7, 0.02
BUDGET = 0.3
Rows = NDArray[np.float32]


def items(seed: int, duplicates: bool) -> tuple[Rows, NDArray[Any], NDArray[Any]]:
    """Vectors, each one's original, and its cluster."""
    random = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(CLUSTERS), EACH)
    rows = random.standard_normal((CLUSTERS, DIM))[cluster]
    rows += 0.5 * random.standard_normal(rows.shape)
    plain = len(rows)
    if duplicates:
        which = random.integers(0, plain, plain // 4)
    else:
        which = np.repeat(random.choice(plain, COPIED, replace=False), COPIES)
    copies = rows[which] + JITTER * random.standard_normal((which.size, DIM))
    original = np.concatenate([np.arange(plain), which])
    rows = np.concatenate([rows, copies])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), original, cluster[original]


def shuffled(cluster: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    return random.permutation(cluster.size)


def by_cluster(cluster: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    order = random.permutation(cluster.size)
    return order[np.argsort(cluster[order], kind="stable")]


def in_turn(cluster: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    order = by_cluster(cluster, random)
    _, first, sizes = np.unique(cluster[order], return_index=True, return_counts=True)
    turn = (np.arange(order.size) - np.repeat(first, sizes)) / np.repeat(sizes, sizes)
    return order[np.lexsort((random.random(order.size), turn))]


ARRIVALS: dict[str, tuple[Callable[..., NDArray[Any]], bool]] = {
    "shuffled": (shuffled, False),
    "sorted by cluster": (by_cluster, False),
    "one of each cluster in turn": (in_turn, False),
    "shuffled, 20 % duplicates": (shuffled, True),
}


def kept(near: Neighbourhood, first: Rows, seed: int) -> dict[str, NDArray[np.bool_]]:
    """What stays by each rule: masks over arrivals."""
    size = len(near.table)
    budget = round(BUDGET * size)
    refreshed = near.table.distances[:, :4].astype(np.float64).mean(1)
    found = {}
    for name, gains in (("published", first), ("refreshed", refreshed)):
        top = np.zeros(size, bool)
        top[np.argsort(-gains, kind="stable")[:budget]] = True
        drawn = np.zeros(size, bool)
        drawn[choose(np.maximum(gains, 1e-9), budget, generator(seed)).places] = True
        found[f"{name}, the highest"], found[f"{name}, in proportion"] = top, drawn
    found["expected, one round"] = staying(near, budget, seed, rounds=1)
    found["expected (ours)"] = staying(near, budget, seed)
    return found


def measure(seed: int, arrival: str) -> dict[str, dict[str, float]]:
    order_of, duplicates = ARRIVALS[arrival]
    rows, original, cluster = items(seed, duplicates)
    order = order_of(cluster, np.random.default_rng(seed + 1000))
    rows, original = np.ascontiguousarray(rows[order]), original[order]
    near = Neighbourhood(neighbours(DIM, "exact", precision="float32"), frozen=True)
    for at in range(0, len(rows), 500):
        near.add_(np.arange(at, min(at + 500, len(rows))), rows[at : at + 500])
    first = near.gains()
    near.frozen = False
    copied = np.bincount(original)[original] > 1
    tenth = len(rows) // 10
    out = {}
    for name, mask in kept(near, first, seed).items():
        covered = np.bincount(original[mask & copied], minlength=original.max() + 1) > 0
        groups = np.unique(original[copied])
        far = np.concatenate(
            [(1 - rows[at : at + 1000] @ rows[mask].T).min(1) for at in range(0, len(rows), 1000)]
        )
        out[name] = {
            "first tenth": float(mask[:tenth].mean()),
            "last tenth": float(mask[-tenth:].mean()),
            "groups covered": float(covered[groups].mean()),
            "single items kept": float(mask[~copied].mean()),
            "mean distance to what is kept": float(np.maximum(far, 0).mean()),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    seeds = range(parser.parse_args().seeds)
    results: dict[str, Any] = {}
    for arrival in ARRIVALS:
        runs = [measure(seed, arrival) for seed in seeds]
        results[arrival] = {}
        for rule in runs[0]:
            means = {key: float(np.mean([run[rule][key] for run in runs])) for key in runs[0][rule]}
            ratios = [run[rule]["first tenth"] / max(run[rule]["last tenth"], 1e-9) for run in runs]
            told = {
                "first over last tenth": means.pop("first tenth")
                / max(means.pop("last tenth"), 1e-9),
                "its standard error": float(np.std(ratios, ddof=1) / math.sqrt(len(ratios))),
                "group over single item": means["groups covered"] / means["single items kept"],
                **means,
            }
            results[arrival][rule] = {key: round(value, 4) for key, value in told.items()}
            print(arrival, "|", rule, results[arrival][rule], flush=True)
    write("growth_order", results, seeds=seeds)


if __name__ == "__main__":
    main()
