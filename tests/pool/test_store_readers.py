"""Readers in other processes, checks and backups while a writer goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from store_model import DIM, texts, unit

from sparing.pool.items import Vectors
from sparing.pool.store import Store, backup, check, merging


def _write(path: Path, seconds: float) -> None:
    """Append, set, forget, merge, until the time is over."""
    end = time.monotonic() + seconds
    with Store.open(path, write=True) as store:
        number = 0
        while time.monotonic() < end:
            added = store.append(texts(5, f"n{number}"), Vectors(main=unit(5, number)), source="s")
            store.set_column("group", added.ids, np.full(5, number))
            store.set_scores("gain", added.ids, np.full(5, number), version="v")
            if number % 4 == 3:
                store.forget(added.ids[:2])
            number += 1


def _consistent(store: Store) -> None:
    """Each item's vector, group and score are those that it was stored with, or not yet set."""
    ids = store.ids()
    for item, row, group in zip(
        store.items(ids), store.vectors(ids), store.column("group"), strict=True
    ):
        number, place = (int(part) for part in item.key[1:].split("/"))
        np.testing.assert_array_equal(row, unit(5, number)[place])
        assert group in (-1, number)
    assert len(store.column("key")) == len(ids)


def _until(store: Store, attempts: int) -> None:
    """Read until no item is forgotten in the midst of it: then all must fit together."""
    for _ in range(attempts):
        before = store.size
        try:
            _consistent(store)
        except (ValueError, AssertionError):
            # what was forgotten, or merged, between two calls makes a reader look anew
            if store.size == before:
                raise
            continue
        return
    raise AssertionError("the store was never at rest")


@pytest.mark.parametrize("seconds", [1.5, pytest.param(30.0, marks=pytest.mark.slow)])
def test_all_that_is_read_beside_a_writer_fits_together(
    tmp_path: Path, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "FAN", 3)
    path = tmp_path / "s"
    with Store.create(path, dim=DIM, shard=500) as store:
        store.append(texts(5, "n999"), Vectors(main=unit(5, 999)), source="s")
        store.set_column("group", [0], [999])
    child = os.fork()
    if not child:
        status = 1
        try:
            _write(path, seconds)
            status = 0
        finally:
            os._exit(status)
    reader = Store.open(path)
    rounds, status = 0, None
    while status is None:
        reader.refresh()
        _until(reader, 50)
        assert check(path) == []
        copy = tmp_path / f"copy-{rounds}"
        backup(path, copy)
        with Store.open(copy) as copied:
            _consistent(copied)
        assert check(copy) == []
        rounds += 1
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
    assert status == 0
    reader.refresh()
    _until(reader, 1)
    assert reader.size > 5
