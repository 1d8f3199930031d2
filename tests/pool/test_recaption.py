"""The queue of captions: leases, dead captioners, files, forgetting; and the rule that judges."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sparing.core.errors import RequestError
from sparing.pool.encoders import unit
from sparing.pool.items import Item, Vectors
from sparing.pool.recaption import Lease, Recaptions, judge


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_text_goes_from_waiting_to_taken(tmp_path: Path) -> None:
    queue = Recaptions(tmp_path / "queue.sqlite")
    assert queue.put([5, 3, 5, 9]) == 3
    assert queue.put([3]) == 0
    leases = queue.lease(2)
    assert [lease.id for lease in leases] == [5, 3]
    other = Recaptions(tmp_path / "queue.sqlite")
    assert [lease.id for lease in other.lease(5)] == [9]
    assert other.lease(5) == []
    assert other.offer(leases[0], "a cat")
    assert queue.offer(leases[1], "a dog")
    assert not queue.offer(leases[1], "a dog again")
    ids, texts = queue.offered()
    assert dict(zip(ids.tolist(), texts, strict=True)) == {5: "a cat", 3: "a dog"}
    queue.settle(ids, [True, False])
    assert queue.counts() == {"leased": 1, "taken": 1, "refused": 1}
    assert len(queue.offered()[0]) == 0
    for held in (queue, other):
        held.close()


def test_a_lease_that_ran_out_goes_to_another_and_is_given_up_at_last() -> None:
    clock = Clock()
    queue = Recaptions(seconds=10, attempts=2, clock=clock)
    queue.put([1])
    first = queue.lease(1)[0]
    assert queue.lease(1) == []
    clock.now = 11
    second = queue.lease(1)[0]
    assert (second.id, second.attempt) == (1, 2)
    assert not queue.offer(first, "too late")
    clock.now = 22
    assert queue.lease(1) == []
    assert queue.counts() == {"given up": 1}
    assert not queue.offer(second, "too late")


def test_what_is_given_back_waits_again() -> None:
    queue = Recaptions(attempts=2)
    queue.put([1, 2])
    lease = queue.lease(1)[0]
    assert queue.give_back(lease)
    assert not queue.give_back(lease)
    again = queue.lease(2)
    assert {lease.id: lease.attempt for lease in again} == {1: 2, 2: 1}
    assert queue.give_back(again[0])
    assert queue.counts() == {"leased": 1, "given up": 1}


def test_forgotten_items_leave_no_text_on_the_disk(tmp_path: Path) -> None:
    queue = Recaptions(tmp_path / "queue.sqlite")
    queue.put(range(50))
    for lease in queue.lease(50):
        queue.offer(lease, f"secret words of {lease.id}.")
    queue.forget([7])
    left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"secret words of 7." not in left
    assert b"secret words of 8." in left
    assert 7 not in queue.offered()[0]
    assert not queue.offer(Lease(id=7, token="", attempt=1), "gone")
    queue.close()


def test_wrong_files_and_texts_are_told(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"words, not a database" * 50)
    with pytest.raises(RequestError, match="no queue of captions"):
        Recaptions(tmp_path / "junk")
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version = 5")
    newer.close()
    with pytest.raises(RequestError, match="format 5"):
        Recaptions(tmp_path / "newer")
    queue = Recaptions()
    queue.put([1])
    with pytest.raises(RequestError, match="give_back"):
        queue.offer(queue.lease(1)[0], "  ")
    with pytest.raises(RequestError, match="count"):
        queue.lease(0)


WORDS = {"right": [1.0, 0.0], "wrong": [0.0, 1.0], "so so": [0.8, 0.6]}


class Dual:
    dim, version = 2, "dual"

    def __call__(self, items: Sequence[Item]) -> Vectors:
        main = np.tile(np.float32([1, 0]), (len(items), 1))
        said = np.array([WORDS[item.text or ""] for item in items], np.float32).reshape(-1, 2)
        return Vectors(main=main, second=unit(said)[0])


def test_a_text_is_replaced_only_if_it_did_not_fit_and_the_new_one_does() -> None:
    before = ["wrong", "wrong", "so so", "right"]
    offered = ["right", "wrong", "right", "wrong"]
    items = [Item(key=str(at), image=b"i", text=value) for at, value in enumerate(before)]
    found = judge(items, Dual()(items), offered, Dual(), 0.5)
    assert found.taken.tolist() == [True, False, False, False]
    assert [item.text for item in found.items] == ["right", "wrong", "so so", "right"]
    assert found.vectors.second is not None
    again = Dual()(found.items)
    np.testing.assert_allclose(found.vectors.second, again.second)
    none = judge([], Dual()([]), [], Dual(), 0.5)
    assert none.items == ()
    with pytest.raises(RequestError, match="one of each"):
        judge(items, Dual()(items), offered[:2], Dual(), 0.5)
    with pytest.raises(RequestError, match="CLIP"):
        judge(items, Vectors(main=Dual()(items).main), offered, Dual(), 0.5)
