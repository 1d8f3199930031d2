"""What a budget keeps: groups of copies are covered, and nobody is favoured for coming early."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparing.core.errors import RequestError
from sparing.pool.choice import choose, generator
from sparing.pool.coverage import staying, variables
from sparing.pool.growth import Growth
from sparing.pool.neighbourhood import Neighbourhood
from sparing.pool.neighbours import neighbours

DIM = 24


def unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(n: int, seed: int) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((n // 20, DIM))
    return np.repeat(centres, 20, axis=0) + 0.5 * random.standard_normal((n, DIM))


def valued(rows: NDArray[np.float32], frozen: bool = False) -> Neighbourhood:
    items = Neighbourhood(neighbours(DIM), frozen=frozen)
    items.add_(np.arange(len(rows)), rows)
    return items


def test_a_group_of_copies_is_covered_as_a_single_item_is_at_least() -> None:
    """Seven near copies of each of 100 items, 30 % stay; the refreshed gain loses them all."""
    random = np.random.default_rng(0)
    plain = clustered(2000, 1)
    which = np.repeat(random.choice(2000, 100, replace=False), 7)
    rows = unit(np.concatenate([plain, plain[which] + 0.02 * random.standard_normal((700, DIM))]))
    original = np.concatenate([np.arange(2000), which])
    copied = np.isin(original, which)
    order = random.permutation(2700)
    rows, original, copied = rows[order], original[order], copied[order]
    items = valued(rows)

    def groups(mask: NDArray[np.bool_]) -> float:
        return float(np.isin(np.unique(which), original[mask]).mean())

    stays = staying(items, 810, seed=0)
    assert stays.sum() == 810
    assert groups(stays) >= 0.7 * stays[~copied].mean()
    assert groups(stays) > stays[~copied].mean()
    refreshed = items.table.distances[:, :4].astype(np.float64).mean(1)
    lost = np.zeros(2700, bool)
    lost[choose(refreshed, 810, generator(0)).places] = True
    assert groups(lost) < 0.1
    # rounds that discount keep fewer copies of the groups that they cover, and more of the rest
    once = staying(items, 810, seed=0, rounds=1)
    assert stays[copied].sum() < once[copied].sum()

    def far(mask: NDArray[np.bool_]) -> float:
        return float((1 - rows @ rows[mask].T).min(1).mean())

    assert far(stays) < far(once)


@pytest.mark.parametrize("arrival", ["shuffled", "sorted", "in turn"])
def test_nobody_is_favoured_for_coming_early(arrival: str) -> None:
    plain = clustered(4000, 2)
    order = np.random.default_rng(3).permutation(4000)
    if arrival == "sorted":
        order = np.arange(4000)
    if arrival == "in turn":  # one of each cluster, then the next of each
        order = np.arange(4000).reshape(-1, 20).T.ravel()
    rows = unit(plain[order])
    stays = [staying(valued(rows), 1200, seed) for seed in range(4)]
    first = np.mean([mask[:400].mean() for mask in stays])
    last = np.mean([mask[-400:].mean() for mask in stays])
    assert 0.9 < first / last < 1.1
    if arrival != "sorted":
        frozen = valued(rows, frozen=True).gains()
        top = np.argsort(-frozen)[:1200]
        assert (top < 400).sum() > 3 * (top >= 3600).sum()


def test_a_budget_kept_all_along_favours_nobody_either() -> None:
    """An item's variable is its own for ever: a survivor need not be lucky anew each time."""
    rows = unit(clustered(3000, 4)[np.random.default_rng(5).permutation(3000)])
    first, last = [], []
    for seed in range(3):
        pool = Growth(encoder=lambda batch: batch, clean=False, seed=seed)
        for at in range(0, 3000, 500):
            pool.add(torch.from_numpy(rows[at : at + 500]))
            pool.evict(600)
        kept = pool.kept()
        first.append((kept < 600).sum())
        last.append((kept >= 2400).sum())
        assert len(kept) == 600
    assert 0.7 < np.sum(first) / np.sum(last) < 1.4


def test_variables_are_exponential_and_always_the_same() -> None:
    ids = np.arange(20_000)
    one = variables(ids, 0)
    assert one.mean() == pytest.approx(1, abs=0.03)
    assert np.mean(one > 1) == pytest.approx(np.exp(-1), abs=0.015)
    assert variables(ids[700:710], 0).tolist() == one[700:710].tolist()
    assert abs(np.corrcoef(one, variables(ids, 1))[0, 1]) < 0.03
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.03


def test_a_budget_is_exact_and_its_limits_are_told() -> None:
    items = valued(unit(clustered(200, 0)))
    for budget in (0, 1, 7, 199):
        assert staying(items, budget, 0).sum() == budget
    assert staying(items, 500, 0).all()
    with pytest.raises(RequestError, match="budget must be at least 0"):
        staying(items, -1, 0)
    same = valued(np.repeat(unit(clustered(20, 0))[:1], 30, axis=0))  # all gains are nearly 0
    assert staying(same, 10, 0).sum() == 10
