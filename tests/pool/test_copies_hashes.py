"""Items by perceptual hash, as they come and go, against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from sparing.core.errors import RequestError
from sparing.pool.copies import hashes as module
from sparing.pool.copies.greedy import Near, Traits, owners
from sparing.pool.copies.groups import ranks
from sparing.pool.copies.hashes import Hashes, Marks
from sparing.pool.items import Vectors
from sparing.pool.members import COPY, STANDS, Members


def drawn(size: int, seed: int) -> Marks:
    """Hashes in clusters: some equal, some differ by a few bits; some are none."""
    random = np.random.default_rng(seed)
    found = random.integers(1, 2**63, 40).astype(np.uint64)[random.integers(0, 40, size)]
    for _ in range(4):
        flip = np.uint64(1) << random.integers(0, 64, size).astype(np.uint64)
        found ^= np.where(random.random(size) < 0.5, flip, np.uint64(0))
    found[random.random(size) < 0.05] = 0
    return found


@pytest.mark.parametrize("bits", [0, 1, 4, 7])
def test_what_is_near_equals_brute_force(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RECENT", 60)
    monkeypatch.setattr(module, "_BLOCK", 50)
    marks, held = drawn(500, bits), np.zeros(500, bool)
    index, random = Hashes(bits), np.random.default_rng(7)
    for at in range(0, 500, 50):
        new = np.arange(at, at + 50)
        index.add(new, marks[new])
        held[new] = True
        gone = random.choice(500, 12, replace=False)
        index.remove(gone)
        held[gone] = False
        assert len(index) == (held & (marks != 0)).sum()
        asked = random.choice(500, 40, replace=False)
        rows, ids = index.near(marks[asked])
        assert held[ids].all()
        found = {(int(asked[r]), int(marks[i])) for r, i in zip(rows, ids, strict=True)}
        values = np.unique(marks[held & (marks != 0)])
        expected = {
            (int(a), int(v))
            for a in asked
            for v in values
            if marks[a] and (int(marks[a]) ^ int(v)).bit_count() <= bits
        }
        assert found == expected


def test_a_mass_of_equal_hashes_is_told_once() -> None:
    index = Hashes(3)
    index.add(np.arange(200_000), np.full(200_000, 12345, np.uint64))
    rows, ids = index.near(np.full(1000, 12345, np.uint64))
    assert rows.tolist() == list(range(1000))
    assert set(ids.tolist()) == {0}
    index.remove(np.arange(100))
    assert index.near(np.array([12344], np.uint64))[1].tolist() == [100]
    with pytest.raises(RequestError, match="at most 7"):
        Hashes(8)


@pytest.mark.parametrize("seed", range(8))
def test_groups_by_vector_or_hash_in_any_order_equal_the_whole(seed: int) -> None:
    """Drifts by both, masses of equal hashes, items that leave and come back, and forgetting."""
    random = np.random.default_rng(seed)
    size, limit, bits = 240, 0.01, 3
    angle = np.concatenate(
        [random.uniform(0, 2, size - 60), np.repeat(random.uniform(3, 4, 3), 20)]
    )
    rows = np.stack([np.cos(angle), np.sin(angle), 0.3 * random.standard_normal(size)], 1)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    rows, marks = rows[random.permutation(size)], drawn(size, seed)
    marks[random.choice(size, 40)] = 77
    quality, hashes = random.integers(0, 4, size), random.permutation(size)
    ids = np.arange(size)
    near = Near(limit=limit, bits=bits)

    def whole(some: np.ndarray) -> list[int]:
        rank = ranks(quality[some], hashes[some])
        traits = Traits(vectors=rows[some], marks=marks[some])
        return some[owners(traits, rank, near)].tolist()  # type: ignore[no-any-return]

    members = Members(
        3,
        read=lambda some, _: rows[some],
        details=lambda some: (quality[some], hashes[some]),
        limit=limit,
        bits=bits,
    )
    batch, out = int(random.integers(1, 50)), ids[:0]
    for at in range(0, size, batch):
        new = ids[at : at + batch]
        wanted = random.random(new.size) < 0.9  # the others have a place, and come in at the end
        members.add_(new, Vectors(main=rows[new]), wanted, marks[new])
        out = np.concatenate([out, new[~wanted]])
        if at // batch == 2:
            gone = random.choice(new[0], min(10, new[0]), replace=False)
            gone = np.setdiff1d(gone, out)
            members.leave_(gone)
            out = np.concatenate([out, gone])
    members.back_(np.sort(out))
    found = members.groups.representatives(ids)
    assert found.tolist() == whole(ids)
    assert (members.role == np.where(found == ids, STANDS, COPY)).all()
    gone = np.unique(random.integers(0, size, 40))
    members.forget_(gone)
    stay = np.setdiff1d(ids, gone)
    assert members.groups.representatives(stay).tolist() == whole(stay)
