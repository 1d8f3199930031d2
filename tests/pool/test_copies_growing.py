"""Groups of a growing set equal those of the whole set, in any order of arrival."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.pool.copies.greedy import Near, Traits, owners
from sparing.pool.copies.groups import pairs, pairs_of_lists, ranks, representatives
from sparing.pool.copies.growing import Groups

LIMIT = 0.02


def copied(seed: int, items: int, most: int, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(vectors, which original each is a copy of)."""
    drawn = np.random.default_rng(seed)
    source = np.repeat(np.arange(items), drawn.integers(1, most + 1, items))
    base = drawn.standard_normal((items, dim))[source]
    rows = base + 0.05 * drawn.standard_normal(base.shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), source


def whole(rows: np.ndarray, quality: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    distance = 1 - rows @ rows.T
    one, two = np.nonzero(distance <= LIMIT)
    found = pairs(one, two, distance[one, two], LIMIT)
    return representatives(found, np.arange(len(rows)), ranks(quality, hashes))


def nearest(rows: np.ndarray, start: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(distances, positions) of the k nearest among all before ``stop``, for the new ones."""
    distance = 1 - rows[start:stop] @ rows[:stop].T
    distance[np.arange(stop - start), np.arange(start, stop)] = np.inf
    near = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, near, 1), near


@pytest.mark.parametrize("seed", range(3))
def test_vectors_give_the_groups_that_all_pairs_give(seed: int) -> None:
    rows, _ = copied(seed, 300, 6)
    quality = np.random.default_rng(seed).integers(0, 3, len(rows))
    hashes = np.random.default_rng(seed).permutation(len(rows))
    expected = whole(rows, quality, hashes)
    made = owners(Traits(vectors=rows), ranks(quality, hashes), Near(limit=LIMIT))
    assert made.tolist() == expected.tolist()
    assert 300 <= len(np.unique(made)) < 0.7 * len(rows)


@pytest.mark.parametrize("in_full", [False, True])
@pytest.mark.parametrize("batch", [1, 37])
def test_batches_in_any_order_end_in_the_same_groups(in_full: bool, batch: int) -> None:
    rows, _ = copied(1, 60, 5)
    drawn = np.random.default_rng(4)
    quality, hashes = drawn.integers(0, 3, len(rows)), drawn.permutation(len(rows))
    expected = whole(rows, quality, hashes)
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(rows))
        moved, good, mark = rows[order], quality[order], hashes[order]
        groups = Groups(
            lambda ids, good=good, mark=mark: (good[ids], mark[ids]),
            traits=(lambda ids, moved=moved: Traits(vectors=moved[ids])) if in_full else None,
            near=Near(limit=LIMIT) if in_full else None,
        )
        told = np.arange(len(rows))
        # in full, short lists do; without vectors all pairs are needed
        k = 3 if in_full else 12
        for at in range(0, len(rows), batch):
            stop = min(at + batch, len(rows))
            distance, near = nearest(moved, at, stop, k)
            changed = groups.add(pairs_of_lists(np.arange(at, stop), distance, near, LIMIT))
            assert (told[changed.ids] == changed.before).all()
            told[changed.ids] = changed.now
        made = groups.representatives(np.arange(len(rows)))
        assert (made == told).all()
        assert order[made].tolist() == expected[order].tolist()


def test_a_hundred_copies_with_lists_of_four_are_one_group() -> None:
    drawn = np.random.default_rng(0)
    base = drawn.standard_normal((1, 32)) + 1e-4 * drawn.standard_normal((100, 32))
    rows = (base / np.linalg.norm(base, axis=1, keepdims=True)).astype(np.float32)
    quality = drawn.random(100)
    groups = Groups(
        lambda ids: (quality[ids], ids),
        traits=lambda ids: Traits(vectors=rows[ids]),
        near=Near(limit=LIMIT),
    )
    for at in range(0, 100, 10):
        distance, near = nearest(rows, at, at + 10, 4)
        groups.add(pairs_of_lists(np.arange(at, at + 10), distance, near, LIMIT))
    best = int(quality.argmax())
    assert set(groups.representatives(np.arange(100)).tolist()) == {best}
    assert groups.members(best).tolist() == list(range(100))


@given(st.integers(0, 10_000), st.lists(st.integers(0, 24), max_size=12))
@settings(deadline=None, max_examples=40)
def test_after_removals_the_rest_is_grouped_as_if_they_had_never_been(
    seed: int, gone: list[int]
) -> None:
    rows, _ = copied(seed, 10, 4)
    size = len(rows)
    drawn = np.random.default_rng(seed)
    quality, hashes = drawn.integers(0, 2, size), drawn.permutation(size)
    groups = Groups(lambda ids: (quality[ids], hashes[ids]))
    distance = 1 - rows @ rows.T
    one, two = np.nonzero(distance <= LIMIT)
    groups.add(pairs(one, two, distance[one, two], LIMIT))
    out = np.unique([at for at in gone if at < size]).astype(np.int64)
    changed = groups.remove(out)
    stay = np.setdiff1d(np.arange(size), out)
    assert not np.isin(changed.ids, out).any()
    expected = stay[whole(rows[stay], quality[stay], hashes[stay])]
    assert groups.representatives(stay).tolist() == expected.tolist()


def test_state_goes_on_where_it_was() -> None:
    rows, _ = copied(2, 40, 5)
    quality, half = np.arange(len(rows)), len(rows) // 2

    def add(groups: Groups, start: int, stop: int) -> None:
        found = pairs_of_lists(np.arange(start, stop), *nearest(rows, start, stop, 12), LIMIT)
        groups.add(found)

    first, again = Groups(lambda ids: (quality[ids], ids)), Groups(lambda ids: (quality[ids], ids))
    add(first, 0, half)
    again.load(first.state())
    for groups in (first, again):
        add(groups, half, len(rows))
    every = np.arange(len(rows))
    assert again.representatives(every).tolist() == first.representatives(every).tolist()
    assert first.paired.tolist() == again.paired.tolist()


def test_an_item_is_asked_for_its_quality_once() -> None:
    asked: list[int] = []

    def details(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked.extend(ids.tolist())
        return np.ones(len(ids)), np.stack([ids % 3, ids], 1)

    groups = Groups(details)
    for new in range(1, 30):
        groups.add(pairs([0] * new, np.arange(1, new + 1), np.zeros(new)))
    assert sorted(asked) == list(range(30))
    assert groups.members(0).tolist() == list(range(30))


def test_hashes_that_agree_make_copies_of_what_the_vectors_keep_apart() -> None:
    rows = np.eye(4, dtype=np.float32)
    marks = np.array([0b111, 0b110, 0b1111000000, 0], np.uint64)
    made = owners(Traits(vectors=rows, marks=marks), np.arange(4), Near(limit=0.1, bits=2))
    assert made.tolist() == [0, 0, 2, 3]
    made = owners(Traits(vectors=rows, marks=marks), np.arange(4), Near(limit=0.1))
    assert made.tolist() == [0, 1, 2, 3]


def test_comparing_in_full_needs_both() -> None:
    with pytest.raises(RequestError, match="both traits= and near="):
        Groups(lambda ids: (ids, ids), near=Near(limit=0.1))
    with pytest.raises(RequestError, match="limit"):
        Near(limit=3)
    empty = Groups(lambda ids: (ids, ids))
    assert empty.representatives([3, 1]).tolist() == [3, 1]
    assert len(empty.add(pairs([], [], [])).ids) == 0
    assert len(empty.remove([5]).ids) == 0


@pytest.mark.parametrize("seed", range(6))
def test_masses_and_drifts_in_batches_equal_the_whole(seed: int) -> None:
    """Drifts that join components, masses of copies, and qualities with many ties."""
    drawn = np.random.default_rng(seed)
    angle = np.concatenate([drawn.uniform(0, 1.5, 80), np.repeat(drawn.uniform(3, 4, 3), 40)])
    rows = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    rows = rows[drawn.permutation(len(rows))]
    quality, hashes = drawn.integers(0, 4, len(rows)), drawn.permutation(len(rows))
    limit = float(1 - np.cos(0.1))
    groups = Groups(
        lambda ids: (quality[ids], hashes[ids]),
        traits=lambda ids: Traits(vectors=rows[ids]),
        near=Near(limit=limit),
    )
    told = np.arange(len(rows))
    batch = int(drawn.integers(1, 30))
    for at in range(0, len(rows), batch):
        stop = min(at + batch, len(rows))
        near = pairs_of_lists(np.arange(at, stop), *nearest(rows, at, stop, 200), limit)
        changed = groups.add(near)
        assert (told[changed.ids] == changed.before).all()
        told[changed.ids] = changed.now
        part = np.arange(stop)
        rank = ranks(quality[:stop], hashes[:stop])
        expected = owners(Traits(vectors=rows[:stop]), rank, Near(limit=limit))
        assert groups.representatives(part).tolist() == expected.tolist()
    assert (groups.representatives(np.arange(len(rows))) == told).all()
    gone = np.unique(drawn.integers(0, len(rows), 25))
    groups.remove(gone)
    stay = np.setdiff1d(np.arange(len(rows)), gone)
    rank = ranks(quality[stay], hashes[stay])
    expected = stay[owners(Traits(vectors=rows[stay]), rank, Near(limit=limit))]
    assert groups.representatives(stay).tolist() == expected.tolist()
