"""Files of clicks: what is read, how it is split and held, and what is wrong in them."""

from __future__ import annotations

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from sparing.core.errors import RequestError
from sparing.tasks.clicks import files
from sparing.tasks.clicks.columns import Misplaced
from sparing.tasks.clicks.encoded import Encoded
from sparing.tasks.clicks.held import Streamed
from sparing.tasks.clicks.read import find_schema, read
from sparing.tasks.clicks.schema import Schema
from sparing.tasks.clicks.shuffle import Batches
from sparing.tasks.clicks.split import ByHash, ByTime

SCHEMA = Schema(label="y", categorical=("a", "s"), numeric=("x",), time="w")
BY_TIME = ByTime(development=7, test=8)
TINY = Schema(label="y", categorical=("a",))
ALL = ByHash(development=0, test=0)


def made(rows: int = 3000, *, ordered: bool = False, seed: int = 0) -> pa.Table:
    g = np.random.default_rng(seed)
    week = g.integers(0, 10, rows)
    return pa.table(
        {
            "y": g.integers(0, 2, rows),
            "a": pa.array(g.integers(0, 50, rows), mask=g.random(rows) < 0.05),
            "s": pa.array([f"v{i}" for i in g.integers(0, 90, rows)], mask=g.random(rows) < 0.05),
            "x": pa.array(g.normal(size=rows), mask=g.random(rows) < 0.05),
            "w": np.sort(week) if ordered else week,
            "row": np.arange(rows),
        }
    )


def written(path, table, **options):
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path, **options)
    else:
        pa.csv.write_csv(table, path)
    return path


def as_set(rows: Encoded) -> list[tuple]:
    each = zip(rows.ids, rows.numeric, rows.labels, rows.time, strict=True)
    return sorted((*i.tolist(), *n.tolist(), int(y), int(t)) for i, n, y, t in each)


def whole(source) -> list[tuple]:
    return sorted(row for k in range(len(source.sizes)) for row in as_set(source.block(k)))


def cells(tmp_path, *lines: str, name: str = "log.csv"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- the same rows from every file and every way to hold them ------------------------------------


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_rows_are_those_of_the_file_however_they_are_held(name, tmp_path):
    table = made()
    path = written(tmp_path / name, table, **({"row_group_size": 70} if "parquet" in name else {}))
    memory = read(path, SCHEMA, BY_TIME, hold="memory", block=256)
    week, label = table["w"].to_numpy(), table["y"].to_numpy()
    for part, rows in (
        (memory.train, week < 7),
        (memory.development, week == 7),
        (memory.test, week >= 8),
    ):
        assert np.array_equal(part.labels, label[rows])
        assert np.array_equal(part.time, week[rows])
        part.check(memory.vocabulary.sizes)
    train = table.filter(week < 7)
    values = memory.vocabulary["s"].values.to_pylist()
    told = [None if i == 0 else values[i - 2] for i in memory.train.ids[:, 1]]
    assert told == train["s"].to_pylist()
    x = train["x"].to_numpy()
    wanted = np.nan_to_num((x - np.nanmean(x)) / np.nanstd(x))
    assert np.abs(memory.train.numeric[:, 0] - wanted).max() < 1e-6

    disk = read(path, SCHEMA, BY_TIME, hold="disk", block=256, cache=tmp_path / "cache")
    assert isinstance(disk.train.ids, np.memmap)
    assert as_set(disk.train) == as_set(memory.train)
    assert as_set(disk.test) == as_set(memory.test)
    if "parquet" in name:
        streamed = read(path, SCHEMA, BY_TIME, hold="stream")
        assert isinstance(streamed.train, Streamed)
        assert whole(streamed.train) == as_set(memory.train)
        assert as_set(streamed.development) == as_set(memory.development)


def test_nothing_of_held_out_rows_is_in_the_vocabulary(tmp_path):
    table = pa.table({"y": [0, 1, 0, 1], "a": [1, 1, 2, 3], "s": ["p", "q", "r", "p"],
                      "x": [1.0, 3.0, 100.0, 100.0], "w": [1, 2, 7, 8]})  # fmt: skip
    log = read(written(tmp_path / "log.parquet", table), SCHEMA, BY_TIME)
    assert log.vocabulary.sizes == (3, 4)
    assert log.development.ids.tolist() == [[1, 1]]
    assert log.test.ids.tolist() == [[1, 2]]
    assert log.vocabulary.scales[0].mean == 2


def test_several_files_are_one_log(tmp_path):
    table = made()
    one = read(written(tmp_path / "one.parquet", table), SCHEMA, BY_TIME)
    folder = tmp_path / "parts"
    folder.mkdir()
    written(folder / "0.parquet", table[:1000])
    # the same ids in 32 bits, and numbers without a point
    rest = table[1000:].set_column(1, "a", table[1000:]["a"].cast(pa.int32()))
    written(folder / "1.parquet", rest)
    other = read(folder, SCHEMA, BY_TIME)
    assert np.array_equal(one.train.ids, other.train.ids)
    assert np.array_equal(one.train.numeric, other.train.numeric)
    csv = [written(tmp_path / f"{i}.csv", t) for i, t in enumerate((table[:1000], table[1000:]))]
    assert np.array_equal(one.train.ids, read(csv, SCHEMA, BY_TIME).train.ids)


def test_packed_csv_and_tabs_without_a_header_are_read(tmp_path):
    text = b"1\t5\t2.5\n0\t\t\\N\n0\t6\t0.5\n"
    path = tmp_path / "day_0.tsv.gz"
    path.write_bytes(gzip.compress(text))
    schema = Schema(label="y", categorical=("a",), numeric=("x",), header=("y", "a", "x"))
    log = read(path, schema, ALL)
    assert log.train.labels.tolist() == [1, 0, 0]
    assert log.train.ids.tolist() == [[2], [0], [3]]
    assert log.train.numeric[:, 0].tolist() == [1, 0, -1]
    assert log.development is None
    assert log.test is None


def test_auto_takes_memory_then_streams_or_shards(tmp_path):
    fine = written(tmp_path / "fine.parquet", made(), row_group_size=50)
    ordered = written(tmp_path / "ordered.parquet", made(ordered=True), row_group_size=50)
    single = written(tmp_path / "single.parquet", made())
    csv = written(tmp_path / "log.csv", made())

    def held(path, memory):
        return read(path, SCHEMA, BY_TIME, memory=memory, cache=tmp_path / "cache").hold

    assert held(fine, 1 << 20) == "memory"
    assert [held(p, 0) for p in (fine, ordered, single, csv)] == ["stream", "disk", "disk", "disk"]


def test_csv_is_parsed_once_if_its_rows_fit(tmp_path, monkeypatch):
    for number in range(2):
        written(tmp_path / f"{number}.csv", made(seed=number))
    opened = []
    plain = files._csv_file

    def counted(file, schema, types, **options):
        if types:
            opened.append(file.name)
        return plain(file, schema, types, **options)

    monkeypatch.setattr(files, "_csv_file", counted)
    monkeypatch.setattr(files, "_BYTES", 4096)
    kept = read(tmp_path, SCHEMA, BY_TIME, hold="memory")
    assert opened == ["0.csv", "1.csv"]
    opened.clear()
    # the first file's rows fit, those of both do not
    again = read(tmp_path, SCHEMA, BY_TIME, hold="memory", memory=100_000)
    assert opened == ["0.csv", "1.csv", "0.csv", "1.csv"]
    for part in ("train", "development", "test"):
        assert as_set(getattr(kept, part)) == as_set(getattr(again, part))


def test_room_on_the_disk_is_taken_where_the_system_has_no_call_for_it(tmp_path, monkeypatch):
    made = Encoded.empty(3000, 4, 2, tmp_path)
    made.ids[:] = np.arange(12_000).reshape(3000, 4)
    made.flush()
    monkeypatch.delattr("os.posix_fallocate")
    (tmp_path / "other").mkdir()
    other = Encoded.empty(3000, 4, 2, tmp_path / "other")
    file = tmp_path / "other" / "ids.npy"
    assert file.stat().st_size == (tmp_path / "ids.npy").stat().st_size
    assert 512 * file.stat().st_blocks >= file.stat().st_size
    assert not other.ids.any()
    other.put_(slice(0, 3000), made)
    other.flush()
    np.save(tmp_path / "other" / "bounds.npy", other.bounds)
    assert np.array_equal(Encoded.load(tmp_path / "other").ids, made.ids)


def test_shards_mix_a_log_that_is_sorted_by_time(tmp_path):
    path = written(tmp_path / "log.parquet", made(7000, ordered=True))
    log = read(path, SCHEMA, BY_TIME, hold="disk", block=500, cache=tmp_path / "cache")
    sizes = log.train.sizes
    assert len(sizes) == -(-len(log.train) // 500)
    mean, deviation = log.train.time.mean(), log.train.time.std()
    for k in range(len(sizes)):
        off = abs(log.train.block(k).time.mean() - mean) * sizes[k] ** 0.5 / deviation
        assert off < 4


def test_the_cache_is_found_again_and_made_anew_where_it_no_longer_fits(tmp_path, monkeypatch):
    path = written(tmp_path / "log.parquet", made())
    options = {"hold": "disk", "cache": tmp_path / "cache"}
    first = read(path, SCHEMA, BY_TIME, **options)
    rows = as_set(first.train)
    from sparing.tasks.clicks import read as module

    def never(*args, **kwargs):
        raise AssertionError("it was read again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "survey", never)
        again = read(path, SCHEMA, BY_TIME, **options)
        assert again.vocabulary.fingerprint == first.vocabulary.fingerprint
        for change in ({"cut_off": 2}, {"block": 100}):
            with pytest.raises(AssertionError):
                read(path, SCHEMA, BY_TIME, **options, **change)
        with pytest.raises(AssertionError):
            read(path, SCHEMA, ByTime(development=6, test=8), **options)
    (entry,) = (tmp_path / "cache").iterdir()
    # a new file, since the old one is mapped
    (entry / "train" / "ids.npy").unlink()
    (entry / "train" / "ids.npy").write_bytes(b"damaged")
    assert as_set(read(path, SCHEMA, BY_TIME, **options).train) == rows
    written(path, made(seed=1))
    assert as_set(read(path, SCHEMA, BY_TIME, **options).train) != rows


def test_a_writer_that_fails_leaves_nothing_that_would_be_read(tmp_path, monkeypatch):
    path = written(tmp_path / "log.parquet", made())
    from sparing.tasks.clicks import held

    def fails(self, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(held.Shards, "places", fails)
        with pytest.raises(KeyboardInterrupt):
            read(path, SCHEMA, BY_TIME, hold="disk", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_vocabulary_that_is_given_is_used(tmp_path):
    path = written(tmp_path / "log.parquet", made())
    old = read(path, SCHEMA, BY_TIME, cut_off=30).vocabulary
    new = read(written(tmp_path / "new.parquet", made(seed=2)), SCHEMA, BY_TIME, vocabulary=old)
    assert new.vocabulary is old
    new.train.check(old.sizes)
    assert (new.train.ids[:, 0] == 1).any()


# ---- schema and split ----------------------------------------------------------------------------


def test_a_schema_is_found_from_types(tmp_path):
    table = made(20).append_column("when", pa.array([None] * 20, pa.timestamp("s")))
    path = written(tmp_path / "log.parquet", table)
    found = find_schema(path, "y", time="w", numeric=["row"])
    assert found == Schema(label="y", categorical=("a", "s"), numeric=("row", "x"), time="w")
    assert find_schema(written(tmp_path / "l.csv", made(20)), "y", time="w").numeric == ("x",)
    with pytest.raises(RequestError, match='unknown column "clicked"'):
        find_schema(path, "clicked")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"label": "y"}, "no columns to learn from"),
        ({"label": "y", "categorical": "abc"}, 'must be a list of names, got "abc"'),
        ({"label": "y", "categorical": ("a",), "numeric": ("a",)}, '"a" is named twice'),
        ({"label": "y", "categorical": ("y",)}, '"y" is named twice'),
        ({"label": "y", "categorical": ("a",), "time": "y"}, "label and time at once"),
        ({"label": "y", "categorical": ("a",), "text": ("b",)}, '"b" is given as text'),
    ],
)
def test_a_schema_that_does_not_fit_is_refused(given, said):
    with pytest.raises(RequestError, match=said):
        Schema(**given)


def test_a_split_by_time_leaves_out_what_is_before_and_after(tmp_path):
    path = written(tmp_path / "log.parquet", made())
    log = read(path, SCHEMA, ByTime(start=1, development=5, test=7, end=9))
    parts = [set(part.time.tolist()) for part in (log.train, log.development, log.test)]
    assert parts == [{1, 2, 3, 4}, {5, 6}, {7, 8}]


@pytest.mark.parametrize(
    ("type_", "unit"), [(pa.timestamp("ns"), 86400), (pa.date32(), 1), (pa.date64(), 1)]
)
def test_dates_are_days_and_points_in_time_seconds(type_, unit, tmp_path):
    days = pa.array([0, 1, 2, 3], pa.int32()).cast(pa.date32()).cast(type_)
    path = written(tmp_path / "l.parquet", pa.table({"y": [0, 1, 0, 1], "a": [1] * 4, "t": days}))
    schema = Schema(label="y", categorical=("a",), time="t")
    log = read(path, schema, ByTime(development=2 * unit, test=3 * unit))
    assert log.train.time.tolist() == [0, unit]
    assert log.test.time.tolist() == [3 * unit]


def test_a_split_by_hash_has_the_shares_and_keeps_a_user_together(tmp_path):
    table = made(20_000)
    path = written(tmp_path / "log.parquet", table, row_group_size=3000)
    log = read(path, SCHEMA, ByHash(development=0.1, test=0.2))
    assert len(log.test) == pytest.approx(4000, rel=0.06)
    assert len(log.development) == pytest.approx(2000, rel=0.08)
    assert len(log.train) + len(log.development) + len(log.test) == 20_000
    streamed = read(path, SCHEMA, ByHash(development=0.1, test=0.2), hold="stream")
    assert whole(streamed.train) == as_set(log.train)
    for column in ("a", "s"):
        users = read(path, SCHEMA, ByHash(column=column, seed=3))
        position = SCHEMA.categorical.index(column)
        # who is held out is not in the vocabulary of the training rows
        assert set(users.test.ids[:, position].tolist()) <= {0, 1}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ByTime(development=8, test=7), "in order.*got 8, 7"),
        (lambda: ByHash(development=0.5, test=0.5), "leave no rows to train on"),
        (lambda: ByHash(test=1.5), r"test must be in \[0, 1\]"),
    ],
)
def test_a_split_that_cannot_be_is_refused(make, said):
    with pytest.raises(RequestError, match=said):
        make()


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (
            ByTime(development=10, test=10),
            r"test part empty: of 3,000 rows, with times from 0 to 9",
        ),
        (ByTime(development=7, test=10), r"the test part empty"),
        (ByTime(development=-5, test=3), r"the train part empty.*0 into train"),
    ],
)
def test_an_empty_part_is_an_error(split, said, tmp_path):
    path = written(tmp_path / "log.parquet", made())
    with pytest.raises(RequestError, match=said):
        read(path, SCHEMA, split)


@pytest.mark.parametrize("name", ["l.parquet", "l.csv"])
@pytest.mark.parametrize(("bad", "shown"), [(2, "2"), (-1, "-1"), (0.5, "0.5"), (None, "None")])
def test_a_label_that_is_not_0_or_1_is_told_by_file_and_row(name, bad, shown, tmp_path):
    table = pa.table({"y": [0, 1, bad, 1], "a": [1, 2, 3, 4]})
    path = written(tmp_path / name, table)
    where = rf'column "y", row 3 of .*{name}: {shown}(\.0)? is not a label, 0 or 1'
    with pytest.raises(Misplaced, match=where):
        read(path, TINY, ALL)


def test_labels_that_are_words_are_told_by_row(tmp_path):
    path = cells(tmp_path, "y,a", "0,1", "yes,2")
    with pytest.raises(RequestError, match="holds texts and is given as label"):
        read(path, TINY, ALL)


def test_rows_are_told_as_those_of_the_file_not_of_the_part(tmp_path):
    table = made().to_pydict()
    table["x"][2500] = float("inf")
    table["w"][2500] = 0
    path = written(tmp_path / "log.parquet", pa.table(table), row_group_size=1000)
    with pytest.raises(Misplaced, match=r'column "x", row 2,501 of .*log.parquet: inf'):
        read(path, SCHEMA, BY_TIME)
    table["w"][2500] = None
    path = written(tmp_path / "log.parquet", pa.table(table))
    with pytest.raises(Misplaced, match=r'column "w", row 2,501 of .*: None is not a time'):
        read(path, SCHEMA, BY_TIME)


@pytest.mark.parametrize("rows", [10, 3000])
def test_a_cell_of_csv_that_is_no_number_is_told_by_row(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BYTES", 4096)
    lines = ["y,skipped,a,x", *["0,q,5,2.5"] * rows, "1,q,6,ten", "0,q,5,2.5"]
    schema = Schema(label="y", categorical=("a",), numeric=("x",))
    where = rf'column "x", row {rows + 1:,} of .*: \'ten\' is not a number'
    if rows < 1000:  # in the first block, by which the type is found
        where = "holds texts and is given as number"
    with pytest.raises(RequestError, match=where):
        read(cells(tmp_path, *lines), schema, ALL)


def test_whole_numbers_and_later_texts_in_csv_name_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BYTES", 4096)
    rows = 3000
    path = cells(tmp_path, "y,a", *["0,12345"] * rows, "1,AB")
    with pytest.raises(RequestError, match=rf"row {rows + 1:,} of .*'AB'.*text=\[\"a\"\]"):
        read(path, TINY, ALL)
    log = read(path, Schema(label="y", categorical=("a",), text=("a",)), ALL)
    assert log.vocabulary["a"].values.to_pylist() == ["12345", "AB"]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_column_that_changes_its_type_between_files_is_an_error(ending, tmp_path):
    numbers, words = pa.table({"y": [0], "a": [1]}), pa.table({"y": [1], "a": ["x"]})
    paths = [written(tmp_path / f"{i}.{ending}", t) for i, t in enumerate((numbers, words))]
    said = rf'"a" changes its type between files: int64 in .*0.{ending}, string in .*1.{ending}'
    with pytest.raises(RequestError, match=said):
        read(paths, TINY, ALL)
    log = read(paths, Schema(label="y", categorical=("a",), text=("a",)), ALL)
    assert log.vocabulary["a"].values.to_pylist() == ["1", "x"]


def test_a_column_that_is_empty_in_one_file_takes_the_type_of_the_other(tmp_path):
    empty = pa.table({"y": [0, 1], "a": pa.nulls(2)})
    full = pa.table({"y": [1, 0], "a": [7, 8]})
    for ending in ("parquet", "csv"):
        paths = [written(tmp_path / f"{i}.{ending}", t) for i, t in enumerate((empty, full))]
        assert read(paths, TINY, ALL).train.ids.tolist() == [[0], [0], [2], [3]]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["y,b", "0,1"], r'has no column "a"; .*Known: b, y'),
        (["y,a,a", "0,1,2"], 'two columns "a"'),
        (["y,a", "0,1", "0,1,2"], "row 2 is no row of CSV: Expected 2 columns, got 3"),
        ([""], "cannot be read: .*Empty CSV file"),
        (["y,a"], "the train part empty: of 0 rows"),
    ],
)
def test_csv_that_does_not_fit_is_refused(lines, said, tmp_path):
    with pytest.raises(RequestError, match=said):
        read(cells(tmp_path, *lines), TINY, ALL)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(RequestError, match="there is no file"):
        read(tmp_path / "none.csv", TINY, ALL)
    with pytest.raises(RequestError, match="holds no Parquet and no CSV"):
        read(tmp_path, TINY, ALL)
    with pytest.raises(RequestError, match="no files are given"):
        read([], TINY, ALL)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(written(tmp_path / "a.parquet", made(50)).read_bytes()[:300])
    with pytest.raises(RequestError, match=r"cut.parquet cannot be read"):
        read(cut, SCHEMA, BY_TIME)
    csv = cells(tmp_path, "y,a", "0,1")
    with pytest.raises(RequestError, match="not of one kind"):
        read([tmp_path / "a.parquet", csv], TINY, ALL)
    with pytest.raises(RequestError, match="neither Parquet nor CSV"):
        read(cells(tmp_path, "", name="log.json"), TINY, ALL)
    with pytest.raises(RequestError, match="CSV cannot be streamed"):
        read(csv, TINY, ALL, hold="stream")
    with pytest.raises(RequestError, match='way to hold rows "ram"'):
        read(csv, TINY, ALL, hold="ram")
    with pytest.raises(RequestError, match="needs a time column"):
        read(csv, TINY, ByTime(development=1, test=2))


def test_ids_out_of_range_are_told_by_column_row_and_value(tmp_path):
    rows = read(written(tmp_path / "log.parquet", made()), SCHEMA, BY_TIME).train
    sizes = [52, 92]
    rows.check(sizes, ["a", "s"])
    rows.ids[17, 1] = 92
    with pytest.raises(Misplaced, match=r'column "s", row 18: 92 is not an id from 0 to 91'):
        rows.check(sizes, ["a", "s"])
    rows.ids[17, 1] = -1
    with pytest.raises(Misplaced, match=r'column "number 2", row 18: -1'):
        rows.check(sizes)
    with pytest.raises(RequestError, match=r"ids must be \(rows, 1\)"):
        rows.check([52])


def test_files_that_change_while_they_are_streamed_are_an_error(tmp_path):
    path = written(tmp_path / "log.parquet", made(), row_group_size=100)
    log = read(path, SCHEMA, BY_TIME, hold="stream")
    written(path, made(seed=5), row_group_size=100)
    with pytest.raises(RequestError, match=r"have changed|cannot be read"):
        list(Batches(log.train, 64))
