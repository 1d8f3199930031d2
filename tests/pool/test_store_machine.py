"""Any sequence of writes, reopenings and compactions agrees with plain dictionaries."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from store_model import DIM, Model, agree

from sparing.pool.items import Item, Vectors
from sparing.pool.store import Store, View, backup, check, compact, merging

# few different ones, so that content and keys come again
items = st.builds(
    lambda text, key, label: Item(key=key, text=text, label=label),
    st.sampled_from([f"text {i} " * (1 + i % 5) for i in range(25)]),
    st.sampled_from([f"key {i}" for i in range(12)]),
    st.sampled_from([-1, 0]),
)


class Machine(RuleBasedStateMachine):
    """The store, a reader that was opened at some moment, and what both must hold."""

    @initialize(shard=st.sampled_from([1, 150, 1000]))
    def begin(self, shard: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "s"
        self.model, self.reader = Model(), None
        self.store = Store.create(self.path, dim=DIM, shard=shard)

    @rule(batch=st.lists(items, max_size=6), seed=st.integers(0, 99), cursor=st.integers(0, 9))
    def append(self, batch: list[Item], seed: int, cursor: int) -> None:
        rows = np.random.default_rng(seed).standard_normal((len(batch), DIM)).astype(np.float32)
        added = self.store.append(batch, Vectors(main=rows), source="s", cursor=cursor)
        used = {item.key for item in self.model.items.values()}
        ids = self.model.append(batch, rows, "s", cursor)
        assert added.ids.tolist() == ids
        for item, number in zip(batch, ids, strict=True):
            if number >= 0 and item.key in used:
                self.model.drops.append((item.key, "kept", number))
            if number >= 0:
                used.add(item.key)

    def some(self, data: Any, least: int = 0) -> list[int]:
        chosen = st.sampled_from(list(self.model.items))
        return data.draw(st.lists(chosen, min_size=least, max_size=4, unique=True))

    @precondition(lambda self: self.model.items)
    @rule(
        data=st.data(), name=st.sampled_from(["reason", "label", "group"]), value=st.integers(0, 7)
    )
    def set_column(self, data: Any, name: str, value: int) -> None:
        ids = self.some(data)
        self.store.set_column(name, ids, [value] * len(ids))
        self.model.columns[name].update(dict.fromkeys(ids, value))

    @precondition(lambda self: self.model.items)
    @rule(data=st.data(), version=st.sampled_from(["v1", "v2"]), value=st.sampled_from([0.5, 2.0]))
    def set_scores(self, data: Any, version: str, value: float) -> None:
        ids = self.some(data)
        self.store.set_scores("gain", ids, [value] * len(ids), version=version)
        self.model.scores.setdefault(version, {}).update(dict.fromkeys(ids, value))

    @rule()
    def snapshot(self) -> None:
        self.store.snapshot()
        self.model.snapshot()

    @precondition(lambda self: self.model.items)
    @rule(data=st.data())
    def forget(self, data: Any) -> None:
        ids = self.some(data, least=1)
        self.store.forget(ids)
        self.model.forget(ids)
        if self.reader is not None:
            for number in ids:
                self.reader[1].pop(number, None)

    @rule()
    def read(self) -> None:
        self.reader = (Store.open(self.path), dict(self.model.items))

    @precondition(lambda self: self.reader is not None)
    @rule()
    def look(self) -> None:
        view: View = self.reader[0]
        known = [number for number in self.reader[1] if number in set(view.ids().tolist())]
        assert known == list(self.reader[1])
        assert view.items(known) == list(self.reader[1].values())

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.path, write=True)

    @rule()
    def compact(self) -> None:
        self.store.close()
        compact(self.path)
        self.store = Store.open(self.path, write=True)

    @rule()
    def copy(self) -> None:
        shutil.rmtree(self.folder / "copy", ignore_errors=True)
        backup(self.path, self.folder / "copy")
        with Store.open(self.folder / "copy") as copied:
            assert copied.items(copied.ids()) == list(self.model.items.values())

    @invariant()
    def same(self) -> None:
        agree(self.store, self.model)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            assert check(self.path) == []
            shutil.rmtree(self.folder)


@pytest.mark.parametrize("examples", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_any_sequence_agrees_with_plain_dictionaries(
    examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "FAN", 3)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=12 if examples < 10 else 30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
