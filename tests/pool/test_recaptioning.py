"""Misaligned pairs get new texts: the rule, the store's record of it, kills, and the way back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparing.core.errors import RequestError
from sparing.pool.cleaning import Cleaning
from sparing.pool.growth import Growth
from sparing.pool.items import REASONS, Item, Vectors
from sparing.pool.recaption import Recaptions
from sparing.pool.store import Store

SIZE, WRONG = 200, 20
MISALIGNED = REASONS.index("misaligned")
IMAGES = np.random.default_rng(3).standard_normal((SIZE, 16)).astype(np.float32)
IMAGES /= np.linalg.norm(IMAGES, axis=1, keepdims=True)


class Dual:
    """An image is its vector; the text "i, in words" has nearly that of image i."""

    dim, version = 16, "dual-1"

    def __call__(self, items: Sequence[Item]) -> Vectors:
        main = np.stack([np.asarray(item.tensor, np.float32) for item in items])
        said = [int((item.text or "0").split(",")[0]) for item in items]
        noise = np.random.default_rng(5).standard_normal((SIZE, 16)).astype(np.float32)
        second = IMAGES[said] + 0.05 * noise[said]
        return Vectors(main=main, second=second)


def pairs(texts: Sequence[int]) -> list[Item]:
    return [
        Item(key=str(at), tensor=IMAGES[at], text=f"{text}, in words", label=at % 3)
        for at, text in enumerate(texts)
    ]


def told() -> list[int]:
    """The last WRONG images have the text of another."""
    return [*range(SIZE - WRONG), *range(WRONG)]


def grown(path: Path | None = None) -> Growth:
    pool = Growth(path, encoder=Dual(), clean=Cleaning(copies=1e-4))
    pool.add(pairs(told()))
    return pool


def which(images: Sequence[Any]) -> list[int]:
    return [int((IMAGES @ np.asarray(image)).argmax()) for image in images]


def right(images: Sequence[Any]) -> list[str]:
    return [f"{at}, anew" for at in which(images)]


def test_texts_that_fit_make_new_items_beside_the_old() -> None:
    pool = grown()
    out = np.flatnonzero(pool.reasons == MISALIGNED)
    assert set(out.tolist()) >= set(range(SIZE - WRONG, SIZE))
    calls = []

    def captioner(images: Sequence[Any]) -> list[str | None]:
        calls.append(len(images))
        # some it does not know, of some it says what is wrong
        kinds: list[Callable[[int], str | None]] = [
            lambda at: f"{at}, anew",
            lambda at: None,
            lambda at: f"{(at + 7) % SIZE}, wrongly",
        ]
        return [kinds[at % 3](at) for at in which(images)]

    decision = pool.recaption(captioner, batch=6)
    assert max(calls) == 6
    new = pool.ids[SIZE:]
    assert decision.ids.tolist() == new.tolist()
    assert len(new) == sum(at % 3 == 0 for at in out)
    for item, made in zip(pool.items(new), decision.ids, strict=True):
        assert item.text == f"{item.key}, anew"
        assert int(item.key) % 3 == item.label == 0
        old = int(pool._store.column("recaption_of")[made])
        assert pool.items([old])[0].text != item.text
        assert old == int(item.key)
    assert (pool.reasons[new] == 0).all()
    assert (pool.reasons[out] == MISALIGNED).all()
    assert not np.isnan(pool.gains()[new]).any()
    assert 'anew" in the place of "' in decision.examples[0].detail
    counts = pool.recaptions.counts()
    assert counts["taken"] == len(new)
    assert counts["given up"] == sum(at % 3 == 1 for at in out)
    assert counts["refused"] == sum(at % 3 == 2 for at in out)
    assert len(pool.recaption(right).ids) == 0
    # and back, and back again
    before = pool.gains()
    pool.undo(decision)
    assert (pool.reasons[new] == MISALIGNED).all()
    assert np.isnan(pool.gains()[new]).all()
    assert pool.recaptions.counts() == counts
    pool.apply(decision)
    assert np.array_equal(pool.gains(), before, equal_nan=True)


def test_the_store_keeps_both_and_forgets_both(tmp_path: Path) -> None:
    with grown(tmp_path / "pool") as pool:
        pool.recaption(right, limit=5)
        assert pool.recaptions.counts()["taken"] == 5
    with Growth(tmp_path / "pool", encoder=Dual(), clean=Cleaning(copies=1e-4)) as pool:
        assert len(pool) == SIZE + 5
        assert pool.recaptions.counts()["taken"] == 5
        pool.recaption(right)
        assert "waiting" not in pool.recaptions.counts()
        origin = pool._store.column("recaption_of")
        new = int(pool.ids[SIZE])
        old = int(origin[SIZE])
        notes = [event.note for event in pool._store.lineage(old)]
        assert any("a new text for its image" in note for note in notes)
        text = pool.items([new])[0].text or ""
        pool.forget([old])
        assert not np.isin([old, new], pool.ids).any()
        assert sum(pool.recaptions.counts().values()) == int((pool.reasons == MISALIGNED).sum())
    left = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert text.encode() not in left
    with Store.open(tmp_path / "pool") as store:
        assert (store.column("recaption_of") >= 0).sum() == len(store) - SIZE + 1


def killed_after(path: Path, calls: int) -> None:
    """Grow, and be killed in that call of the captioner."""
    done = 0

    def captioner(images: Sequence[Any]) -> list[str]:
        nonlocal done
        done += 1
        if done == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(images)

    pid = os.fork()
    if not pid:
        try:
            grown(path).recaption(captioner, batch=8)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_a_kill_loses_nothing_and_the_next_call_goes_on(tmp_path: Path) -> None:
    whole = grown()
    whole.recaption(right)
    killed_after(tmp_path / "pool", 2)
    with Growth(tmp_path / "pool", encoder=Dual(), clean=Cleaning(copies=1e-4)) as pool:
        assert len(pool) == SIZE + 8
        asked: list[int] = []

        def captioner(images: Sequence[Any]) -> list[str]:
            asked.extend(which(images))
            return right(images)

        pool.recaption(captioner, batch=8)
        done = {int(item.key) for item in pool.items(pool.ids[SIZE : SIZE + 8])}
        assert done.isdisjoint(asked)
        assert pool.reasons.tolist() == whole.reasons.tolist()
        texts = [item.text for item in pool.items(pool.kept())]
        assert sorted(map(str, texts)) == sorted(
            str(item.text) for item in whole.items(whole.kept())
        )


def test_texts_offered_elsewhere_or_twice_are_judged_once(tmp_path: Path) -> None:
    with grown(tmp_path / "pool") as pool:
        _ = pool.recaptions
        other = Recaptions(tmp_path / "pool" / "recaptions.sqlite")
        leases = other.lease(3)
        for lease in leases:
            assert other.offer(lease, f"{lease.id}, from elsewhere")
        decision = pool.recaption()
        assert len(decision.ids) == 3
        assert {item.text for item in pool.items(decision.ids)} == {
            f"{lease.id}, from elsewhere" for lease in leases
        }
        # a kill between the store and the queue: the same texts are there once more
        other._db.execute("UPDATE waiting SET state = 2, text = id || ', from elsewhere' "
                          "WHERE state = 3")  # fmt: skip
        other._db.commit()
        other.close()
        assert len(pool.recaption().ids) == 0
        assert len(pool) == SIZE + 3
        assert pool.recaptions.counts()["taken"] == 3


def test_what_a_captioner_may_not_do_is_told_and_costs_nothing() -> None:
    pool = grown()
    assert len(pool.recaption(right, limit=0).ids) == 0
    waits = len(pool.recaptions.lease(1)) and pool.recaptions.counts()["waiting"]

    def fails(_images: Any) -> list[str]:
        raise ValueError("no memory")

    for _ in range(4):
        with pytest.raises(ValueError, match="no memory"):
            pool.recaption(fails)
    with pytest.raises(RequestError, match="gave 1 texts for"):
        pool.recaption(lambda images: ["one"])
    with pytest.raises(RequestError, match="gave int in the place"):
        pool.recaption(lambda images: [1 for _ in images])  # type: ignore[misc]
    assert pool.recaptions.counts() == {"waiting": waits, "leased": 1}
    few = Growth(encoder=Dual())
    few.add(pairs(told()[:20]))
    with pytest.raises(RequestError, match="cannot be judged: fewer than 64 pairs"):
        few.recaption(right)
    with pytest.raises(RequestError, match="empty"):
        _ = Growth(encoder=Dual()).recaptions
