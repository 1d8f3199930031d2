"""Draws of a mixture: exact, spread out, and no sample again before all of its source came."""

from __future__ import annotations

import lzma

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparing
from sparing.core.errors import RequestError
from sparing.samples.mixing_plan import Drawn, Members, mixed
from sparing.samples.mixing_sources import lines

SIZES = (7, 50, 3)
SOURCE_OF = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))


def members() -> Members:
    return Members(SOURCE_OF[torch.randperm(60, generator=torch.Generator().manual_seed(0))], 3)


def draws(weights, length, before=(0, 0, 0), at=(0, 0), of=None, seed=5):
    given_ = members() if of is None else of
    shares = torch.tensor(weights, dtype=torch.float64)
    return mixed(given_, shares / shares.sum(), length, np.array(before), seed=seed, at=at)


def test_counts_are_exact_by_largest_remainder():
    of = members()
    assert of.counts(draws([0.5, 0.3, 0.2], 100)).tolist() == [50, 30, 20]
    assert of.counts(draws([1, 1, 1], 100)).tolist() == [34, 33, 33]
    assert of.counts(draws([1, 0, 0], 9)).tolist() == [9, 0, 0]


def test_none_comes_again_before_all_of_its_source_came_over_many_plans_and_weights():
    of, before, seen = members(), np.zeros(3, np.int64), [[], [], []]
    for epoch, weights in enumerate(([1, 1, 1], [5, 1, 1], [1, 9, 3], [0, 1, 1])):
        plan = draws(weights, 37, before, at=(epoch, 0), of=of)
        for sample in plan.tolist():
            seen[of.source_of[sample]].append(sample)
        before = before + of.counts(plan)
    for source, size in enumerate(SIZES):
        # a plan shuffles a source's draws by spreading, in order: passes are whole
        for start in range(0, len(seen[source]) - size + 1, size):
            turn = seen[source][start : start + size]
            assert sorted(turn) == of.members(source).tolist()
    assert len({tuple(seen[0][i : i + 7]) for i in range(0, 21, 7)}) > 1


def test_every_stretch_of_a_plan_has_nearly_its_share_of_each_source():
    of = members()
    plan = draws([0.6, 0.3, 0.1], 1000, of=of)
    running = np.stack([np.cumsum(of.source_of[plan] == source) for source in range(3)])
    expected = np.outer([0.6, 0.3, 0.1], np.arange(1, 1001))
    assert np.abs(running - expected).max() < 2.0


def test_by_size_a_plan_of_all_samples_takes_each_once():
    assert sorted(draws(SIZES, 60).tolist()) == list(range(60))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 160), st.integers(0, 120)), max_size=8))
def test_what_is_kept_of_permutations_changes_no_draw(calls):
    """Looks forwards and backwards, by one that remembers and by a fresh one each time."""
    of = members()
    for source, start, count in calls:
        fresh = members().through(source, start, count, seed=3)
        assert (of.through(source, start, count, seed=3) == fresh).all()
        assert fresh.shape == (count,)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 80), max_size=6), st.booleans())
def test_draws_are_counted_as_the_dealt_part_grows(places, close):
    of = members()
    plan, drawn = draws([3, 1, 1], 80, of=of), Drawn(of)
    for place in places:
        assert drawn.with_dealt_(plan[:place]).tolist() == of.counts(plan[:place]).tolist()
    if close:
        drawn.close_(plan)
        assert drawn.before.tolist() == of.counts(plan).tolist()
        twice = of.counts(plan) + of.counts(plan[:9])
        assert drawn.with_dealt_(plan[:9]).tolist() == twice.tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.01),
    st.integers(0, 200),
    st.integers(0, 10**6),
)
def test_plans_repeat_and_differ_by_place(weights, length, place):
    first = draws(weights, length, at=(1, place))
    assert first.shape == (length,)
    assert (first == draws(weights, length, at=(1, place))).all()


def test_another_seed_or_epoch_gives_another_order():
    plans = [
        draws([1, 1, 1], 60, at=at, seed=seed)
        for at, seed in (((0, 0), 5), ((1, 0), 5), ((0, 0), 6))
    ]
    assert not (plans[0] == plans[1]).all()
    assert not (plans[0] == plans[2]).all()


def test_weight_on_a_source_without_samples_is_an_error():
    with pytest.raises(RequestError, match=r"sources \[1\] have weight and no samples"):
        mixed(
            Members(torch.tensor([0, 2]), 3),
            torch.ones(3).double() / 3,
            4,
            np.zeros(3, np.int64),
            seed=0,
            at=(0, 0),
        )
    with pytest.raises(RequestError, match="from 0 to 2"):
        Members(torch.tensor([0, 3]), 3)


# ---- sources -------------------------------------------------------------------------------------


def test_sources_are_one_data_set_of_many(tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl.xz"
    text.write_text("one\n\ntwo\n")
    rows.write_bytes(lzma.compress(b'{"x": 1}\n[2]\n'))
    data = sparing.Sources({"text": text, "rows": str(rows), "list": [10, 11, 12]})
    assert [data[i] for i in range(len(data))] == ["one", "two", {"x": 1}, [2], 10, 11, 12]
    assert data.domain_of(torch.arange(7)).tolist() == [0, 0, 1, 1, 2, 2, 2]
    with pytest.raises(IndexError):
        data[7]


def test_a_malformed_line_is_named_with_its_file(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(RequestError, match=r"line 2 of .*broken\.jsonl is not JSON"):
        lines(broken)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\n")
    with pytest.raises(RequestError, match=r"latin\.txt cannot be read.*UTF-8"):
        lines(latin)


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({}, "no sources"),
        ({"a": []}, 'source "a" is empty'),
        ({"a": (i for i in range(3))}, "map-style"),
        ({"a": "/nowhere/at/all.txt"}, "cannot be read"),
    ],
)
def test_sources_that_cannot_be_are_refused(given_, told):
    with pytest.raises(RequestError, match=told):
        sparing.Sources(given_)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(RequestError, match="is empty"):
        sparing.Sources({"a": tmp_path / "empty.txt"})
