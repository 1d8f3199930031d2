"""A pool that grows, in memory and on the disk, and the traps of what was released before it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

import sparing
from sparing.core.errors import RequestError
from sparing.pool.cleaning import NO_CLEANING, Cleaning
from sparing.pool.encoders.cache import Cached
from sparing.pool.growth import Growth
from sparing.pool.items import REASONS, Drop, Item, Vectors
from sparing.pool.store import Store, content_hash

COPIES = Cleaning(copies=0.01)
FRUIT = NDArray[np.float32]


def same(batch: Tensor) -> Tensor:
    return batch


def data(n: int, seed: int = 0, dim: int = 12) -> FRUIT:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((30, dim))
    rows = centres[random.integers(0, 30, n)] + 0.4 * random.standard_normal((n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def with_copies(n: int, copies: int, seed: int = 0) -> FRUIT:
    """Near copies behind everything: the i-th of item i."""
    rows = data(n, seed)
    jitter = np.random.default_rng(seed + 1).standard_normal((copies, rows.shape[1]))
    return np.concatenate([rows, rows[:copies] + 0.003 * jitter.astype(np.float32)])


def grown(rows: FRUIT, path: Path | None = None, block: int = 100, **options: Any) -> Growth:
    pool = Growth(path, encoder=same, **{"clean": COPIES, **options})
    for at in range(0, len(rows), block):
        pool.add(torch.from_numpy(rows[at : at + block]))
    return pool


class Pairs:
    """Both vectors of an item are in its tensor."""

    dim, version = 12, "pairs-1"

    def __call__(self, items: Any) -> Vectors:
        rows = np.stack([item.tensor for item in items])
        return Vectors(main=rows[:, :12], second=rows[:, 12:])


# ---- what is kept and what it is worth -----------------------------------------------------------


def test_a_stream_is_valued_and_sampled() -> None:
    pool = sparing.Growth(encoder=same, clean=False)
    assert pool.gains().size == 0
    assert pool.report()["stored"] == 0
    rows = data(300)
    added = pool.add(torch.from_numpy(rows), labels=torch.arange(300) % 7)
    assert added.ids.tolist() == list(range(300))
    assert pool.items([5])[0].label == 5
    gains = pool.gains()
    assert gains.shape == (300,)
    assert (gains > 0).all()
    one, two = pool.sample(50), pool.sample(50)
    assert len(set(one.tolist())) == 50
    assert one.tolist() != two.tolist()
    loader: Any = DataLoader(pool.kept(), sampler=pool.sampler(), batch_size=300)  # type: ignore[arg-type]
    assert len(next(iter(loader))) == 300


def test_the_groups_and_gains_do_not_depend_on_the_order_of_arrival() -> None:
    rows = with_copies(300, 80)
    order = np.random.default_rng(9).permutation(len(rows))
    one, two = grown(rows), grown(rows[order], block=37)
    kept = (one.reasons == 0)[order]
    assert kept.tolist() == (two.reasons == 0).tolist()
    assert kept.sum() == 300
    assert one.report()["copies"] == {"groups": 80, "items": 160}
    a, b = one.gains()[order], two.gains()
    assert np.isnan(a).tolist() == np.isnan(b).tolist() == (~kept).tolist()
    # the same neighbours; only the tail is learnt from other probes
    assert b[kept] == pytest.approx(a[kept], rel=0.03)


def test_near_copies_are_told_and_are_no_neighbours() -> None:
    pool = grown(data(100))
    before = pool.gains()
    added = pool.add(torch.from_numpy(with_copies(100, 100)[100:]))
    assert (added.ids >= 100).all()
    assert len(pool) == 200
    assert len(pool.kept()) == 100
    told = {drop.reason for drop in added.drops}
    assert told == {"near copy"}
    # a group's gain is that of one item, whichever of the two stands for it
    gains = pool.gains()
    both = np.where(np.isnan(gains[:100]), gains[100:], gains[:100])
    assert both == pytest.approx(before, rel=0.1)


def test_the_very_same_content_is_stored_once() -> None:
    rows = torch.from_numpy(data(10))
    pool = grown(data(10))
    again = pool.add(rows)
    assert again.ids.tolist() == [-1] * 10
    assert {drop.reason for drop in again.drops} == {"same content"}
    assert len(pool) == 10


def test_misaligned_pairs_are_left_out_of_the_choice_and_kept_in_the_store() -> None:
    random = np.random.default_rng(3)
    image = random.standard_normal((400, 12)).astype(np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text = image + 0.1 * random.standard_normal((400, 12)).astype(np.float32)
    wrong = np.arange(400) % 10 == 9
    text[wrong] = np.roll(text[wrong], 1, axis=0)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    pool = Growth(encoder=Pairs(), clean=Cleaning(copies=-1))
    items = [
        Item(key=str(i), tensor=np.concatenate([image[i], text[i]]).astype(np.float32))
        for i in range(400)
    ]
    pool.add(items)
    out = pool.reasons == REASONS.index("misaligned")
    assert out[wrong].mean() > 0.9
    assert out[~wrong].mean() < 0.02
    assert np.isnan(pool.gains()).tolist() == out.tolist()
    assert len(pool) == 400


# ---- the traps of the released code --------------------------------------------------------------


def test_trap_gains_are_not_frozen_at_insertion() -> None:
    rows = data(2000, dim=8)
    pool = grown(rows, clean=False, block=500)
    gains = pool.gains()
    assert gains[:200].mean() / gains[-200:].mean() == pytest.approx(1, abs=0.1)
    frozen = grown(rows, clean=True, published=True, block=500).gains()
    assert frozen[:200].mean() / frozen[-200:].mean() > 1.5


def test_trap_there_is_no_capacity_and_duplicates_do_not_fill_the_index() -> None:
    rows = data(50)
    pool = grown(rows)
    for seed in range(4):
        jitter = np.random.default_rng(seed).standard_normal(rows.shape).astype(np.float32)
        pool.add(torch.from_numpy(rows + 0.002 * jitter))
    assert len(pool) == 250
    assert len(pool._members.main) == len(pool.kept()) == 50


def test_trap_replaced_items_keep_labels_and_data_together() -> None:
    """A better copy takes the place of what stood for its group; ids stay with their contents."""
    pool = Growth(encoder=Words(), clean=Cleaning(copies=0.01, misaligned=0))
    first = pool.add([Item(key="a", text="red", label=1), Item(key="b", text="sea", label=2)])
    assert pool.reasons.tolist() == [0, 0]
    better = pool.add([Item(key="c", text="red red red", label=3)])
    assert pool.reasons.tolist() == [REASONS.index("near copy"), 0, 0]
    assert [item.label for item in pool.items([*first.ids, *better.ids])] == [1, 2, 3]
    assert np.isnan(pool.gains()).tolist() == [True, False, False]


def test_trap_a_batch_is_worth_what_its_items_are_one_by_one() -> None:
    rows = data(120)
    for published in (False, True):
        whole = grown(rows, block=120, clean=False, published=published).gains()
        single = grown(rows, block=1, clean=False, published=published).gains()
        assert whole == pytest.approx(single, abs=2e-3)


def test_trap_the_global_generators_are_left_alone() -> None:
    state, other = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    pool = grown(data(100))
    pool.sample(10)
    pool.evict(50)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == other).all()  # noqa: NPY002


# ---- what leaves ---------------------------------------------------------------------------------


def test_evicted_items_stay_in_the_store_and_are_not_in_the_choice() -> None:
    pool = grown(data(400), clean=False)
    out = pool.evict(150)
    assert len(out) == 250
    assert len(pool.kept()) == 150
    assert (pool.reasons[out] == REASONS.index("evicted")).all()
    assert np.isnan(pool.gains()[out]).all()
    assert pool.evict(150).size == 0
    assert pool.report()["dropped"] == {"evicted": 250}


@pytest.mark.parametrize("disk", [False, True])
def test_forgotten_items_are_gone_and_their_copies_stand_for_themselves(
    disk: bool, tmp_path: Path
) -> None:
    pool = grown(with_copies(200, 40), tmp_path / "pool" if disk else None)
    stands = pool.kept()
    both = stands[(stands < 40) | (stands >= 200)]
    pool.forget(both[:10])
    assert len(pool) == 230
    assert not np.isin(both[:10], pool.ids).any()
    assert len(pool.kept()) == 200  # the other of each pair has taken its place
    with pytest.raises(RequestError):
        pool.items(both[:1])
    gains = pool.gains()
    pool.add(torch.from_numpy(data(20, seed=8)))
    assert pool.gains().shape == (250,)
    assert np.isnan(gains).sum() == 30
    if disk:
        pool.close()
        again = Growth(tmp_path / "pool", encoder=same, clean=COPIES)
        assert len(again.kept()) == 220
        again.close()


@pytest.mark.parametrize("disk", [False, True])
def test_nothing_tells_of_what_was_forgotten(disk: bool, tmp_path: Path) -> None:
    """No file of the pool or of the encoder's cache, no drop that names it, and no page."""
    place = tmp_path / "pool" if disk else None
    encoder = Cached(Words(), tmp_path / "cache.sqlite", hashes=content_hash)
    clean = Cleaning(copies=0.01, misaligned=0)
    pool = Growth(place, encoder=encoder, clean=clean)
    pool.add([Item(key=f"plain {i}", text=f"sun {i}") for i in range(20)])
    secret = Item(key="the key of it", text="red secret words", label=1)
    (number,) = pool.add([secret]).ids.tolist()
    pool.add([Item(key="the key of its twin", text="red secret words", label=1)])
    pool.add([Item(key="another", text="sea", label=1)])
    hidden = [b"secret", b"the key of it", content_hash(secret)]
    if disk:
        pool.snapshot("with it")
        vector = pool._opened().vectors([number])
        hidden.append(vector.tobytes())
        pool.close()
        pool = Growth(place, encoder=encoder, clean=clean)
        (tmp_path / "pool" / "report.html").write_text("an example: red secret words")

    def told() -> list[tuple[str, bytes]]:
        files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
        return [(path.name, what) for path in files for what in hidden if what in path.read_bytes()]

    if disk:
        assert {what for _, what in told()} == set(hidden)
    assert pool.report()["dropped"]["same content"] == 1
    pool.forget([number])
    assert told() == []
    assert "same content" not in pool.report()["dropped"]
    if disk:
        pool.snapshot("without it")
    pool.close()
    encoder.close()
    assert told() == []


def test_decisions_can_be_taken_back() -> None:
    random = np.random.default_rng(0)
    rows = data(400)
    rows[:3] = -rows.mean(0) + 0.3 * random.standard_normal((3, 12)).astype(np.float32)
    again = np.random.default_rng(0)  # the clusters of ``data``
    again.standard_normal((30, 12))
    labels = again.integers(0, 30, 400) % 6
    wrong = random.choice(400, 40, replace=False)
    given = labels.copy()
    given[wrong] = (labels[wrong] + 1 + random.integers(0, 5, 40)) % 6
    pool = Growth(encoder=same, clean=False)
    pool.add(torch.from_numpy(rows), labels=given)
    before = pool.gains()
    for reason, least in (("label issue", 15), ("outlier", 1)):
        decision = pool.find(reason, **({} if reason == "label issue" else {"factor": 2.0}))  # type: ignore[arg-type]
        assert pool.gains() == pytest.approx(before, abs=1e-4)
        assert decision.ids.size >= least
        assert decision.examples
        if reason == "label issue":
            assert np.isin(decision.ids, wrong).mean() > 0.5
        pool.apply(decision)
        assert np.isnan(pool.gains()).sum() == decision.ids.size
        assert pool.report()["dropped"] == {reason: decision.ids.size}
        pool.undo(decision)
        assert (pool.reasons == 0).all()
        assert pool.gains() == pytest.approx(before, abs=1e-4)
    with pytest.raises(RequestError, match='unknown decision "labels"'):
        pool.find("labels")  # type: ignore[arg-type]


def test_labels_are_judged_by_regression_too() -> None:
    random = np.random.default_rng(1)
    rows = random.standard_normal((500, 12)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = rows[:, :3].argmax(1)
    wrong = random.choice(
        np.flatnonzero(np.ptp(np.sort(rows[:, :3], 1)[:, 1:], 1) > 0.2), 30, False
    )
    labels[wrong] = (labels[wrong] + 1) % 3
    pool = Growth(encoder=same, clean=False)
    pool.add(torch.from_numpy(rows), labels=labels)
    pool.evict(480)  # those that are out are not judged
    decision = pool.find("label issue", by="regression")
    assert "regression" in decision.detail
    assert np.isin(decision.ids, pool.kept()).all()
    there = np.intersect1d(wrong, pool.kept())
    assert np.isin(there, decision.ids).mean() > 0.8
    assert np.isin(decision.ids, wrong).mean() > 0.5
    with pytest.raises(RequestError, match='unknown way to tell classes "trees"'):
        pool.find("label issue", by="trees")


def test_where_labels_cannot_be_judged_it_says_so() -> None:
    """Labels by lot: no neighbour knows better."""
    random = np.random.default_rng(0)
    pool = Growth(encoder=same, clean=False)
    pool.add(torch.from_numpy(data(300)), labels=random.integers(0, 10, 300))
    decision = pool.find("label issue")
    assert not decision.ids.size
    assert "none was judged" in decision.detail


# ---- on the disk ---------------------------------------------------------------------------------


def test_a_pool_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = with_copies(300, 50)
    whole = grown(rows)
    with grown(rows[:200], tmp_path / "pool") as pool:
        pool.snapshot("first")
    with Growth(tmp_path / "pool", encoder=same, clean=COPIES) as pool:
        for at in range(200, 350, 100):
            pool.add(torch.from_numpy(rows[at : at + 100]))
        assert pool.gains() == pytest.approx(whole.gains(), nan_ok=True, abs=1e-4)
        assert pool.reasons.tolist() == whole.reasons.tolist()
        kept = pool.evict(100)
    with Growth(tmp_path / "pool", encoder=same, clean=COPIES) as pool:
        assert (pool.reasons[kept] == REASONS.index("evicted")).all()
        assert len(pool.kept()) == 100
        store = pool._opened()
        then = store.at(store.snapshots()[0].number)
        assert then.size == 200
        version = store.versions("gain")[0]
        assert np.isfinite(then.scores("gain", version)).sum() == 200


def _killed(path: str, rows: FRUIT, at: int) -> None:
    pool = Growth(path, encoder=same, clean=COPIES)
    for start in range(0, at, 100):
        pool.add(torch.from_numpy(rows[start : start + 100]), source="a", cursor=start + 100)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_pool_has_all_that_was_added(tmp_path: Path) -> None:
    rows = with_copies(300, 50)
    child = multiprocessing.get_context("fork").Process(
        target=_killed, args=(str(tmp_path / "pool"), rows, 200)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with Growth(tmp_path / "pool", encoder=same, clean=COPIES) as pool:
        assert pool.sources() == {"a": 200}
        pool.add(torch.from_numpy(rows[200:]))
        whole = grown(rows)
        assert pool.reasons.tolist() == whole.reasons.tolist()
        assert pool.gains() == pytest.approx(whole.gains(), nan_ok=True, abs=1e-4)


def test_what_was_saved_beside_the_store_may_be_lost_or_damaged(tmp_path: Path) -> None:
    rows = with_copies(200, 30)
    with grown(rows, tmp_path / "pool") as pool:
        told, reasons = pool.gains(), pool.reasons
    saved = tmp_path / "pool" / "growth"
    (saved / "state.json").write_text("{")
    with Growth(tmp_path / "pool", encoder=same, clean=COPIES) as pool:
        assert pool.gains() == pytest.approx(told, nan_ok=True, abs=1e-4)
        assert pool.reasons.tolist() == reasons.tolist()


def test_everything_beside_the_store_can_be_made_anew(tmp_path: Path) -> None:
    """Also where items were evicted: their copies stay copies, and nobody takes their place."""
    rows = with_copies(200, 60)
    with grown(rows[:230], tmp_path / "pool") as pool:
        pool.evict(120)
        pool.add(torch.from_numpy(rows[230:]))
        told, reasons = pool.gains(), pool.reasons
    shutil.rmtree(tmp_path / "pool" / "growth")
    more = torch.from_numpy(rows[:50] * np.float32(0.999) + np.float32(0.001))
    with Growth(tmp_path / "pool", encoder=same, clean=COPIES) as pool:
        assert pool.reasons.tolist() == reasons.tolist()
        assert pool.gains() == pytest.approx(told, nan_ok=True, abs=1e-4)
        assert np.isnan(pool.gains()).tolist() == (pool.reasons != 0).tolist()
        pool.add(more)
        assert np.isnan(pool.gains()).tolist() == (pool.reasons != 0).tolist()


@pytest.mark.parametrize("pairs", [False, True])
def test_gains_as_of_arrival_outlive_a_kill_and_what_has_left_since(
    pairs: bool, tmp_path: Path
) -> None:
    """They cannot be computed anew: what was there when an item arrived may be gone."""
    width = 24 if pairs else 12
    rows = torch.from_numpy(np.concatenate([data(300, seed) for seed in range(width // 12)], 1))
    options: Any = {"encoder": Pairs() if pairs else same, "published": True}

    def killed() -> None:
        pool = Growth(tmp_path / "pool", **options)
        pool.add(rows[:200])
        pool.evict(60)
        pool.add(rows[200:])
        pool.forget(pool.kept()[:20])
        np.save(tmp_path / "gains.npy", pool.gains())
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with Growth(tmp_path / "pool", **options) as pool:
        np.testing.assert_array_equal(pool.gains(), np.load(tmp_path / "gains.npy"))


def test_gains_as_of_arrival_come_back_with_their_items() -> None:
    pool = grown(data(300), clean=True, published=True)
    before = pool.gains()
    decision = pool.find("outlier", factor=0.5)
    assert decision.ids.size > 10
    pool.apply(decision)
    pool.undo(decision)
    np.testing.assert_array_equal(pool.gains(), before)


def test_copies_of_what_a_killed_pool_forgot_find_others(tmp_path: Path) -> None:
    rows = with_copies(100, 100)
    with grown(rows, tmp_path / "pool") as pool:
        stands = pool.kept()
    shutil.rmtree(tmp_path / "pool" / "growth")
    with Store.open(tmp_path / "pool", write=True) as store:  # and then the kill
        store.forget(stands[:30])
    with Growth(tmp_path / "pool", encoder=same, clean=COPIES) as pool:
        assert len(pool) == 170
        assert len(pool.kept()) == 100
        assert (~np.isnan(pool.gains())).sum() == 100


def test_a_batch_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    rows = with_copies(200, 30)
    with grown(rows[:150], tmp_path / "pool") as pool:
        told = pool.gains()

        def broken(*given: Any) -> None:
            raise OSError("no space left")

        with monkeypatch.context() as patched:
            patched.setattr("sparing.pool.intake.regroup", broken)
            with pytest.raises(Exception, match="no space left"):
                pool.add(torch.from_numpy(rows[150:]))
        assert len(pool) == 150
        assert pool.gains() == pytest.approx(told, abs=1e-4)
        pool.add(torch.from_numpy(rows[150:]))
        assert len(pool) == 230
        assert len(pool.kept()) == 200


# ---- wrong requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Growth(encoder=same, k=0), "k must be at least 1"),
        (lambda: Growth(encoder=3), "encoder must be a name"),  # type: ignore[arg-type]
        (lambda: grown(data(3)).add(torch.zeros(3)), "shape"),
        (lambda: grown(data(3)).add(torch.ones(2, 12), labels=[1]), "1 labels came for 2 items"),
        (lambda: grown(data(3)).add(["a"]), "a batch is a tensor or items"),  # type: ignore[list-item]
        (lambda: grown(data(3)).add(torch.ones(1, 5)), r"expected \(1, 12\)"),
        (lambda: grown(data(3)).sample(4), "cannot choose"),
        (lambda: grown(data(3)).sampler("two_phase"), 'did you mean "two-phase"'),  # type: ignore[arg-type]
        (lambda: grown(data(9)).sampler("two-phase", share=0.5), "take no share"),
        (lambda: grown(data(3)).forget([7]), "no item 7"),
        (lambda: Growth(encoder=same).sample(1), "the pool is empty"),
        (lambda: Growth(encoder=same).snapshot(), "the pool is empty"),
        (lambda: grown(data(3)).snapshot(), "give it a path"),
        (lambda: Cleaning(copies=3), "copies must be in"),
    ],
)
def test_wrong_requests_are_told(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call()


def test_vectors_that_are_not_numbers_are_drops() -> None:
    pool = grown(data(5))
    rows = torch.from_numpy(data(3, seed=2))
    rows[1] = torch.nan
    added = pool.add(rows, drops=[Drop(key="x", reason="unreadable", detail="empty caption")])
    assert (added.ids >= 0).tolist() == [True, False, True]
    assert [drop.reason for drop in added.drops] == ["unreadable", "unreadable"]
    assert pool.report()["dropped"] == {"unreadable": 2}


def test_a_stream_may_begin_with_what_cannot_be_read() -> None:
    pool = Growth(encoder=same)
    nothing = pool.add(torch.full((2, 12), torch.nan))
    assert nothing.ids.tolist() == [-1, -1]
    assert len(pool) == 0
    pool.add(torch.from_numpy(data(3)))
    assert pool.report()["dropped"] == {"unreadable": 2}


def test_another_encoder_is_told(tmp_path: Path) -> None:
    grown(data(5), tmp_path / "pool").close()
    with pytest.raises(RequestError, match="was made with the encoder"):
        Growth(tmp_path / "pool", encoder=Pairs())
    Growth(tmp_path / "pool", encoder=same, clean=NO_CLEANING).close()


class Words:
    """Texts of one first word are at nearly one place."""

    dim, version = 4, "words-1"

    def __call__(self, items: Any) -> Vectors:
        place = {"red": 0, "sea": 1, "sun": 2}
        rows = np.full((len(items), 4), 1e-4, np.float32)
        for row, item in zip(rows, items, strict=True):
            row[place[item.text.split()[0]]] = 1 + 1e-5 * len(item.text)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return Vectors(main=rows)
