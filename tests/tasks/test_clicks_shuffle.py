"""The order of batches, from any position on; and a made-up log whose truth is known."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.tasks.clicks.encoded import Encoded
from sparing.tasks.clicks.shuffle import Batches
from sparing.tasks.clicks.zipf import ZipfLog


def numbered(rows: int, block: int = 7) -> Encoded:
    """Rows whose id is their number."""
    return Encoded(
        np.arange(rows, dtype=np.int32)[:, None],
        np.zeros((rows, 0), np.float32),
        (np.arange(rows) % 2).astype(np.uint8),
        np.arange(rows),
        np.append(np.arange(0, rows, block), rows),
    )


def ids(batches: Batches) -> list[list[int]]:
    return [batch["ids"][:, 0].tolist() for batch in batches]


def flat(lists) -> list[int]:
    return [x for each in lists for x in each]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 90),
    block=st.integers(1, 30),
    batch=st.integers(1, 40),
    buffer=st.integers(1, 5),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_each_row_comes_once_and_any_position_gives_the_rest(
    rows, block, batch, buffer, epoch, shuffle, data
):
    def fresh() -> Batches:
        return Batches(
            numbered(rows, block), batch, seed=5, buffer=buffer, shuffle=shuffle, ahead=False
        )

    batches = fresh()
    batches.set_epoch(epoch)
    whole = ids(batches)
    assert sorted(flat(whole)) == list(range(rows))
    assert len(whole) == len(batches)
    assert [len(b) for b in whole[:-1]] == [batch] * (len(whole) - 1)
    if not shuffle:
        assert flat(whole) == list(range(rows))
    assert ids(batches) == whole
    position = data.draw(st.integers(0, len(whole)))
    later = fresh()
    later.load_state_dict({**fresh().state_dict(), "epoch": epoch, "position": position})
    later.set_epoch(epoch)
    assert ids(later) == whole[position:]
    assert later.state_dict()["position"] == len(whole)
    later.set_epoch(epoch + 1)
    assert sorted(flat(ids(later))) == list(range(rows))


def test_the_state_is_what_was_taken_not_what_was_read_ahead():
    batches = Batches(numbered(1000), 10, seed=1)
    batches.set_epoch(2)
    whole = ids(batches)
    taken = []
    for batch in batches:
        taken.append(batch["ids"][:, 0].tolist())
        if len(taken) == 13:
            break
    state = batches.state_dict()
    assert (state["epoch"], state["position"]) == (2, 13)
    again = Batches(numbered(1000), 10, seed=1, ahead=False)
    again.load_state_dict(state)
    assert taken + ids(again) == whole
    # begun anew without a state, an epoch comes whole
    assert ids(batches) == whole


def test_order_differs_by_epoch_and_seed_and_mixes_over_blocks():
    def order(seed, epoch):
        batches = Batches(numbered(6000, 100), 6000, seed=seed, buffer=8)
        batches.set_epoch(epoch)
        return np.array(flat(ids(batches)))

    one = order(0, 0)
    assert np.array_equal(one, order(0, 0))
    assert not np.array_equal(one, order(0, 1))
    assert not np.array_equal(one, order(1, 0))
    # neighbours are of one block about once in 8 times, not always
    assert 0.08 < (one[1:] // 100 == one[:-1] // 100).mean() < 0.17


def test_passing_over_the_beginning_reads_no_block_of_it():
    class Counting:
        def __init__(self):
            self.rows, self.read = numbered(1000, 10), 0

        @property
        def sizes(self):
            return self.rows.sizes

        def block(self, number):
            self.read += 1
            return self.rows.block(number)

    source = Counting()
    batches = Batches(source, 10, buffer=5, ahead=False)
    batches.load_state_dict({**batches.state_dict(), "position": 90})
    assert len(ids(batches)) == 10
    assert source.read == 10


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_take_the_batches_of_one_process(ranks):
    one = Batches(numbered(205), 12, seed=3, drop_last=True)
    each = [Batches(numbered(205), 12 // ranks, seed=3, rank=r, ranks=ranks) for r in range(ranks)]
    parts = [ids(batches) for batches in each]
    assert [flat(p[i] for p in parts) for i in range(len(one))] == ids(one)
    assert {len(p) for p in parts} == {17}


def test_the_global_generators_are_left_alone():
    import torch

    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    ids(Batches(numbered(100), 8))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_errors_of_the_reading_thread_arrive_and_no_thread_stays():
    class Broken:
        sizes = np.array([5, 5])

        def block(self, number):
            raise RequestError("this block is broken")

    count = threading.active_count()
    with pytest.raises(RequestError, match="this block is broken"):
        next(iter(Batches(Broken(), 2)))
    for _ in Batches(numbered(10_000), 2):
        break
    assert threading.active_count() == count


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 4, "rank": 2, "ranks": 2}, "rank must be from 0 to 1"),
        ({"batch_size": 50, "ranks": 2}, "20 rows give no whole step of 2 x 50"),
    ],
)
def test_batches_that_cannot_be_are_refused(options, said):
    with pytest.raises(RequestError, match=said):
        Batches(numbered(20), **options)
    with pytest.raises(RequestError, match="no rows"):
        Batches(numbered(0), 4)


def test_a_position_of_other_batches_is_refused():
    state = Batches(numbered(20), 4).state_dict()
    with pytest.raises(RequestError, match="with batch_size 4, these have 5"):
        Batches(numbered(20), 5).load_state_dict(state)


KILLED = """
import json, os, signal, sys
import numpy as np
from sparing.tasks.clicks.shuffle import Batches
from sparing.tasks.clicks.zipf import ZipfLog
path, kill = sys.argv[1], int(sys.argv[2])
batches = Batches(ZipfLog(rows=5000, fields=3, ids=100, pairs=1, block_rows=300), 64, buffer=3)
told = {"seen": []}
if os.path.exists(path):
    with open(path) as file:
        told = json.load(file)
    batches.load_state_dict(told["state"])
for epoch in range(batches.epoch, 3):
    batches.set_epoch(epoch)
    for batch in batches:
        told["seen"].append(int((batch["ids"] * 31 + 7).sum() % 10007))
        told["state"] = batches.state_dict()
        with open(path + ".new", "w") as file:
            json.dump(told, file)
        os.replace(path + ".new", path)
        if len(told["seen"]) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """Killed in the middle of an epoch, then at the end of one, which has 79 batches."""
    whole, path = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setattr(sys, "argv", ["", str(whole), "-1"])
    exec(KILLED, {})
    for kill in (40, 79):
        ended = subprocess.run([sys.executable, "-c", KILLED, str(path), str(kill)], check=False)
        assert ended.returncode == -signal.SIGKILL
    monkeypatch.setattr(sys, "argv", ["", str(path), "-1"])
    exec(KILLED, {})
    assert path.read_text() == whole.read_text()


# ---- the made-up log -----------------------------------------------------------------------------


def test_ids_of_the_zipf_log_have_the_stated_frequencies():
    log = ZipfLog(rows=200_000, fields=3, ids=1000, pairs=2)
    assert sum(log.field_sizes) == 1000
    assert log.field_sizes[0] == 4
    rows = np.concatenate([log.block(k).ids for k in range(len(log.sizes))])
    for field, size in enumerate(log.field_sizes):
        wanted = log.frequencies(field)
        assert wanted.sum() == pytest.approx(1)
        found = np.bincount(rows[:, field], minlength=size) / len(rows)
        assert len(found) == size
        error = np.sqrt(wanted / len(rows))
        assert np.abs((found - wanted) / error).max() < 5


def test_labels_of_the_zipf_log_follow_its_odds():
    log = ZipfLog(rows=100_000, fields=5, ids=5000, pairs=3)
    rows = log.block(0)
    odds = log.odds(rows.ids.astype(np.int64))
    probability = 1 / (1 + np.exp(-odds))
    assert odds.std() > 1
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1)):
        chosen = (probability >= low) & (probability < high)
        expected = probability[chosen].mean()
        spread = np.sqrt((probability * (1 - probability))[chosen].mean() / chosen.sum())
        assert abs(rows.labels[chosen].mean() - expected) < 4 * spread


def test_effects_are_normal_and_belong_to_field_and_id():
    log = ZipfLog(rows=1, fields=4, ids=400_000, strength=3, pairs=0)
    effects = log.effects(3, np.arange(100_000))
    assert effects.mean() == pytest.approx(0, abs=0.02)
    assert effects.std() == pytest.approx(1.5, rel=0.02)
    assert abs(np.corrcoef(effects, log.effects(2, np.arange(100_000)))[0, 1]) < 0.02
    other = ZipfLog(rows=1, fields=4, ids=400_000, strength=3, pairs=0, seed=1)
    assert abs(np.corrcoef(effects, other.effects(3, np.arange(100_000)))[0, 1]) < 0.02


def test_ten_million_ids_take_no_memory():
    log = ZipfLog(rows=10**9)
    assert len(log.field_sizes) == 26
    assert sum(log.field_sizes) == 10**7
    assert log.field_sizes == tuple(sorted(log.field_sizes))
    block = log.block(12_345)
    block.check(log.field_sizes)
    assert np.array_equal(block.ids, log.block(12_345).ids)
    assert 0.15 < block.labels.mean() < 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"rows": 1, "ids": 50}, "ids must be at least 104"),
        ({"rows": 1, "fields": 2, "pairs": 2}, "2 fields have 1 pairs"),
    ],
)
def test_a_zipf_log_that_cannot_be_is_refused(options, said):
    with pytest.raises(RequestError, match=said):
        ZipfLog(**options)
