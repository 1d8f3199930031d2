"""Items by perceptual hash, as they come and go, against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from sparing.core.errors import RequestError
from sparing.pool.copies import hashes as module
from sparing.pool.copies.hashes import Hashes, Marks


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
