"""Categories as ids: against dictionaries, on random and edge inputs."""

from __future__ import annotations

import json
from collections import Counter as Plain

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.tasks.clicks.columns import Misplaced
from sparing.tasks.clicks.lookup import Lookup, mix, text_hashes
from sparing.tasks.clicks.scaling import Moments
from sparing.tasks.clicks.vocabulary import Vocabulary

INT64 = st.integers(-(2**63), 2**63 - 1)
CELLS = st.lists(st.none() | st.sampled_from(["", "a", "b", "ab", "ä", "NA", "01", "1"]))
NUMBERS = st.lists(st.none() | INT64 | st.integers(-3, 3))


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(INT64 | st.integers(0, 40), unique=True), wanted=st.lists(INT64))
def test_a_lookup_finds_what_a_dictionary_finds(keys, wanted):
    place = {key: i for i, key in enumerate(keys)}
    asked = np.array([*wanted, *keys], dtype=np.int64)
    found = Lookup(np.array(keys, dtype=np.int64)).find(asked)
    assert found.tolist() == [place.get(int(key), -1) for key in asked]


def test_a_large_sparse_set_is_found_whole():
    keys = np.unique(np.random.default_rng(0).integers(-(2**62), 2**62, 200_000))
    lookup = Lookup(keys)
    assert np.array_equal(lookup.find(keys), np.arange(len(keys)))
    assert (lookup.find(keys + 1)[~np.isin(keys + 1, keys)] == -1).all()


def test_mixing_is_the_published_splitmix():
    # the first numbers of SplitMix64 seeded with 1234567
    steps = np.array([1234567 + i * 0x9E3779B97F4A7C15 for i in range(2)], dtype=object) % 2**64
    assert mix(steps.astype(np.uint64)).tolist() == [6457827717110365317, 3203168211198807973]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(), min_size=1))
def test_hashes_of_texts_depend_on_the_text_alone(words):
    content = [word.encode() for word in words]
    ends = np.cumsum([0, *map(len, content)])
    whole = text_hashes(np.frombuffer(b"".join(content), np.uint8), ends)
    for word, found in zip(content, whole, strict=True):
        alone = text_hashes(np.frombuffer(word, np.uint8), np.array([0, len(word)]))
        assert alone[0] == found
    assert len(set(whole.tolist())) == len(set(words))


def in_python(train: list, cut_off: int) -> dict:
    counts = Plain(value for value in train if value is not None)
    held = sorted((v for v in counts if counts[v] >= cut_off), key=lambda v: (-counts[v], v))
    return {value: 2 + i for i, value in enumerate(held)}


@settings(max_examples=80, deadline=None)
@given(train=st.one_of(CELLS, NUMBERS), seen=CELLS | NUMBERS, cut_off=st.integers(1, 3))
def test_ids_are_those_of_a_plain_dictionary(train, seen, cut_off):
    is_text = any(isinstance(v, str) for v in train)
    type_ = pa.string() if is_text else pa.int64()
    seen = [v if v is None or isinstance(v, str) == is_text else None for v in seen]
    halves = [train[: len(train) // 2], train[len(train) // 2 :]]
    batches = [{"c": pa.array(half, type_)} for half in halves]
    vocabulary = Vocabulary.fit(batches, ["c"], cut_off=cut_off)
    plain = in_python(train, cut_off)
    assert vocabulary.sizes == (2 + len(plain),)
    wanted = [0 if v is None else plain.get(v, 1) for v in [*seen, *train]]
    column = pa.array([*seen, *train], type_)
    assert vocabulary["c"].encode(column).tolist() == wanted
    if is_text:
        assert vocabulary["c"].encode(column.dictionary_encode()).tolist() == wanted
    assert vocabulary["c"].encode(pa.chunked_array([column, column])).tolist() == wanted * 2
    kept = [v for v in plain]
    assert vocabulary["c"].counts.tolist() == [train.count(v) for v in kept]
    assert vocabulary["c"].missing == train.count(None)
    assert vocabulary["c"].rare == sum(v is not None and v not in plain for v in train)


def test_missing_and_unseen_have_ids_of_their_own():
    vocabulary = Vocabulary.fit([{"c": ["x", None, "x", "y"]}], ["c"], cut_off=2)
    assert vocabulary["c"].encode(["x", None, "y", "never"]).tolist() == [2, 0, 1, 1]


def test_a_vocabulary_is_the_same_whatever_the_order_of_the_rows():
    values = np.random.default_rng(1).integers(0, 50, 2000) * 10**9
    one = Vocabulary.fit([{"c": values}], ["c"])
    other = Vocabulary.fit([{"c": part} for part in np.split(values[::-1], 8)], ["c"])
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != Vocabulary.fit([{"c": values[:-50]}], ["c"]).fingerprint


def test_counting_goes_from_a_table_to_hashing_without_losing_any():
    parts = [np.arange(5), np.array([2**40, 3]), np.array([2**40, 3, 3])]
    field = Vocabulary.fit([{"c": part} for part in parts], ["c"])["c"]
    assert field.values.tolist() == [3, 2**40, 0, 1, 2, 4]
    assert field.counts.tolist() == [4, 2, 1, 1, 1, 1]


def test_offsets_are_where_each_field_begins():
    vocabulary = Vocabulary.fit([{"a": [5, 6], "b": ["x", "x"]}], ["a", "b"])
    assert vocabulary.sizes == (4, 3)
    assert vocabulary.offsets.tolist() == [0, 4]
    assert vocabulary.encode({"b": ["x"], "a": [7]}).tolist() == [[1, 2]]


def test_buckets_are_the_same_everywhere_and_keep_missing_apart():
    vocabulary = Vocabulary.fit([{"n": [1], "t": ["a"]}], ["n", "t"], buckets=1000)
    assert vocabulary.sizes == (1002, 1002)
    ids = vocabulary.encode({"n": [1, 2, None, -1], "t": ["a", "b", None, ""]})
    # committed: another machine, version or process must find the same
    assert ids.tolist() == [[467, 188], [112, 566], [0, 0], [938, 537]]
    many = vocabulary["n"].encode(np.arange(100_000))
    counts = np.bincount(many, minlength=1002)
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:].min() > 60
    assert counts[2:].max() < 150


def test_buckets_of_one_field_leave_the_others_alone():
    vocabulary = Vocabulary.fit([{"n": [1, 2], "t": ["a", "b"]}], ["n", "t"], buckets={"n": 10})
    assert vocabulary.sizes == (12, 4)
    with pytest.raises(RequestError, match='unknown field with buckets "m"'):
        Vocabulary.fit([], ["n"], buckets={"m": 3})


def test_whole_numbers_that_came_as_floats_are_read_as_numbers():
    vocabulary = Vocabulary.fit([{"c": np.array([3.0, np.nan, 4.0, 3.0])}], ["c"])
    assert vocabulary["c"].encode([4, 3, None]).tolist() == [3, 2, 0]
    with pytest.raises(Misplaced, match=r'column "c", row 2: 3.5 is not a whole number'):
        vocabulary["c"].encode(np.array([3.0, 3.5]))


@pytest.mark.parametrize("values", [[True, False, None], np.array([1, 0], np.uint8)])
def test_truth_values_and_narrow_numbers_are_categories(values):
    vocabulary = Vocabulary.fit([{"c": pa.array(values)}], ["c"])
    assert vocabulary["c"].encode(pa.array(values)).tolist()[:2] == [3, 2]


def test_a_column_that_was_always_missing_has_two_ids():
    vocabulary = Vocabulary.fit([{"c": pa.nulls(3)}], ["c"])
    assert vocabulary.sizes == (2,)
    assert vocabulary["c"].encode([None, 7]).tolist() == [0, 1]


def test_codes_with_zeros_in_front_stay_apart_as_texts():
    vocabulary = Vocabulary.fit([{"c": ["01", "1"]}], ["c"], text=["c"])
    assert vocabulary["c"].encode(["01", "1", "001"]).tolist() == [2, 3, 1]
    assert vocabulary["c"].encode([1]).tolist() == [3]


def test_texts_where_numbers_were_are_an_error():
    with pytest.raises(RequestError, match=r'"c" holds texts.*text=\["c"\]'):
        Vocabulary.fit([{"c": [1]}, {"c": ["x"]}], ["c"])
    with pytest.raises(RequestError, match='"c" holds texts, and whole numbers when'):
        Vocabulary.fit([{"c": [1]}], ["c"])["c"].encode(["1"])


@pytest.mark.parametrize("type_", [pa.list_(pa.int64()), pa.time64("us")])
def test_values_that_are_no_categories_are_refused(type_):
    with pytest.raises(RequestError, match="cannot be categories"):
        Vocabulary.fit([{"c": pa.nulls(2, type_)}], ["c"])


def test_missing_and_unequal_columns_are_errors():
    vocabulary = Vocabulary.fit([{"a": [1], "b": [2]}], ["a", "b"])
    with pytest.raises(RequestError, match='no column "b"'):
        vocabulary.encode({"a": [1]})
    with pytest.raises(RequestError, match='"b" has 2 rows and "a" has 1'):
        vocabulary.encode({"a": [1], "b": [1, 2]})
    with pytest.raises(RequestError, match='unknown field "c"'):
        vocabulary["c"]


@pytest.fixture
def fitted() -> Vocabulary:
    batch = {"n": [7, 7, None], "t": ["x", "ä", "x"], "h": [1, 2, 3], "x": [1.0, None, 3.0]}
    return Vocabulary.fit([batch], ["n", "t", "h"], ["x"], buckets={"h": 5}, scaling="log")


def test_a_saved_vocabulary_encodes_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "v")
    again = Vocabulary.load(tmp_path / "v")
    assert again.fingerprint == fitted.fingerprint
    rows = {"n": [7, 8, None], "t": ["ä", None, "z"], "h": [1, 2, None], "x": [0.0, 5.0, None]}
    assert again.encode(rows).tolist() == fitted.encode(rows).tolist()
    assert again.numeric(rows).tolist() == fitted.numeric(rows).tolist()
    assert again["n"].counts.tolist() == [2]
    assert again["n"].missing == 1


def test_what_cannot_be_loaded_is_said(fitted, tmp_path):
    with pytest.raises(RequestError, match="no whole vocabulary"):
        Vocabulary.load(tmp_path / "none")
    fitted.save(tmp_path / "v")
    values = tmp_path / "v" / "values.npz"
    values.write_bytes(values.read_bytes()[:-1])
    with pytest.raises(RequestError, match="checksum"):
        Vocabulary.load(tmp_path / "v")
    fitted.save(tmp_path / "v")
    about = tmp_path / "v" / "vocabulary.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "format": 2}))
    with pytest.raises(RequestError, match="reads up to 1; update"):
        Vocabulary.load(tmp_path / "v")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6)), min_size=1),
    st.sampled_from(["standard", "log"]),
)
def test_moments_over_batches_are_those_of_the_whole(parts, rule):
    moments = Moments("x", rule)
    for part in parts:
        moments.add(pa.array(part, pa.float64()))
    scale = moments.scale()
    values = np.array([x for part in parts for x in part])
    if rule == "log":
        values = np.sign(values) * np.log1p(np.abs(values))
    if len(values) and values.std() > 1e-6:
        assert scale.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-6)
        assert scale.deviation == pytest.approx(values.std(), rel=1e-6)


def test_numbers_are_scaled_and_missing_ones_are_the_mean():
    vocabulary = Vocabulary.fit([{"x": [1.0, 3.0, None], "k": [5, 5, 5]}], [], ["x", "k"])
    rows = {"x": [3.0, None, 1.0], "k": [5, 6, None]}
    assert vocabulary.numeric(rows).tolist() == [[1, 0], [0, 1], [-1, 0]]
    assert vocabulary.scales[0].missing == 1
    with pytest.raises(Misplaced, match=r'column "x", row 1: inf is not a finite number'):
        vocabulary.numeric({"x": [np.inf], "k": [1]})
    with pytest.raises(RequestError, match="holds string and is given as numeric"):
        vocabulary.numeric({"x": ["a"], "k": [1]})
    with pytest.raises(RequestError, match='scaled by standard, log, none, got "max"'):
        Vocabulary.fit([], [], ["x"], scaling="max")
