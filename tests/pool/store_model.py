"""What a store must hold, as plain dictionaries, and a series of steps that fills both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparing.pool.items import Item, Vectors
from sparing.pool.store import Store, View

DIM = 4


def unit(n: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def texts(n: int, name: str, length: int = 1) -> list[Item]:
    return [Item(key=f"{name}/{i}", text=f"{name} {i} " * length, label=i % 3) for i in range(n)]


@dataclass
class Model:
    """items, vectors by id; columns and scores by name, then id; drops and cursors."""

    next_id: int = 0
    items: dict[int, Item] = field(default_factory=dict)
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    columns: dict[str, dict[int, int]] = field(
        default_factory=lambda: {"reason": {}, "label": {}, "group": {}}
    )
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    drops: list[tuple[str, str, int | None]] = field(default_factory=list)
    sources: dict[str, Any] = field(default_factory=dict)
    snapshots: list[dict[str, Any]] = field(default_factory=list)

    def append(self, items: list[Item], rows: np.ndarray, source: str, cursor: Any) -> list[int]:
        ids = []
        known = {_content(item): number for number, item in self.items.items()}
        for item, row in zip(items, rows, strict=True):
            if _content(item) in known:
                self.drops.append((item.key, "same content", known[_content(item)]))
                ids.append(-1)
                continue
            number = self.next_id
            self.next_id += 1
            known[_content(item)] = number
            self.items[number], self.vectors[number] = item, row
            self.columns["label"][number] = item.label
            ids.append(number)
        self.sources[source] = cursor if cursor is not None else self.sources.get(source)
        return ids

    def snapshot(self) -> None:
        self.snapshots.append(
            {
                "items": dict(self.items),
                "columns": {name: dict(values) for name, values in self.columns.items()},
            }
        )

    def forget(self, ids: list[int]) -> None:
        held = [self.items, self.vectors, *self.columns.values(), *self.scores.values()]
        for snapshot in self.snapshots:
            held += [snapshot["items"], *snapshot["columns"].values()]
        for number in ids:
            for values in held:
                values.pop(number, None)
        self.drops = [drop for drop in self.drops if drop[2] not in ids]


def _content(item: Item) -> tuple[Any, ...]:
    return item.image, item.text, item.label, None if item.tensor is None else item.tensor.tobytes()


def agree(store: View, model: Model) -> None:
    """That a store holds what the model does, in every way to read it."""
    ids = list(model.items)
    assert store.ids().tolist() == ids
    assert store.items(ids) == list(model.items.values())
    if ids:
        expected = np.stack([model.vectors[number] for number in ids])
        np.testing.assert_array_equal(store.vectors(), expected)
        np.testing.assert_array_equal(store.vectors(ids[::-1]), expected[::-1])
    _columns(store, ids, model.columns)
    for version, values in model.scores.items():
        if values:
            found = store.scores("gain", version)
            expected_scores = [values.get(number, np.nan) for number in ids]
            np.testing.assert_array_equal(found, np.array(expected_scores, np.float32))
    assert store.sources() == model.sources
    assert [(d.key, d.reason) for d in store.drops()] == [d[:2] for d in model.drops]
    snapshots = store.snapshots()
    assert len(snapshots) == len(model.snapshots)
    if isinstance(store, Store):
        for made, was in zip(snapshots, model.snapshots, strict=True):
            view = store.at(made.number)
            assert view.ids().tolist() == list(was["items"])
            assert view.items(view.ids()) == list(was["items"].values())
            _columns(view, list(was["items"]), was["columns"])


def _columns(store: View, ids: list[int], columns: dict[str, dict[int, int]]) -> None:
    assert store.alive.tolist() == [columns["reason"].get(i, 0) == 0 for i in ids]
    for name in columns:
        if name in store.columns():
            empty = 0 if name == "reason" else -1
            expected = [columns[name].get(number, empty) for number in ids]
            assert store.column(name).tolist() == expected, name


Step = tuple[str, Callable[[Store], Any], Callable[[Model], Any]]


def steps() -> list[Step]:
    """Every kind of write, with new shards and merges on the way; shards are of 400 bytes."""

    def add(n: int, name: str, seed: int, length: int = 1) -> Step:
        items, rows = texts(n, name, length), unit(n, seed)

        def real(store: Store) -> None:
            store.append(items, Vectors(main=rows), source="a", cursor={"at": name})

        return f"append {name}", real, lambda m: m.append(items, rows, "a", {"at": name})

    def setting(name: str, ids: list[int], values: list[int]) -> Step:
        return (
            f"set {name}",
            lambda s: s.set_column(name, ids, values),
            lambda m: m.columns[name].update(zip(ids, values, strict=True)),
        )

    def scoring(version: str, ids: list[int], values: list[float]) -> Step:
        return (
            f"score {version}",
            lambda s: s.set_scores("gain", ids, values, version=version),
            lambda m: m.scores.setdefault(version, {}).update(zip(ids, values, strict=True)),
        )

    def both(store: Store) -> None:
        with store.together():
            added = store.append(texts(2, "both"), Vectors(main=unit(2, 9)), source="b", cursor=[1])
            store.set_scores("gain", added.ids, [0.5, 0.75], version="v2")
            store.set_column("reason", added.ids[:1], [2])

    def both_model(model: Model) -> None:
        ids = model.append(texts(2, "both"), unit(2, 9), "b", [1])
        model.scores.setdefault("v2", {}).update(zip(ids, [0.5, 0.75], strict=True))
        model.columns["reason"][ids[0]] = 2

    return [
        add(3, "first", 1),
        setting("reason", [1, 2], [2, 3]),
        scoring("v1", [0, 1], [0.25, 0.5]),
        add(3, "long", 2, length=30),  # more than a shard
        ("snapshot", lambda s: s.snapshot("one"), lambda m: m.snapshot()),
        add(2, "first", 3),  # known content, other vectors: dropped
        setting("group", [0, 4], [7, 8]),
        setting("reason", [2, 5], [0, 4]),
        ("together", both, both_model),
        add(2, "more", 4),
        ("forget", lambda s: s.forget([1, 4]), lambda m: m.forget([1, 4])),
        setting("reason", [0], [5]),
        add(1, "last", 5),
    ]


def create(path: Path) -> None:
    Store.create(path, dim=DIM, encoder="plain", shard=400).close()
