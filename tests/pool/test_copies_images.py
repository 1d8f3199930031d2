"""Perceptual hashes of image files, and the copies that a pool finds by them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparing.core.errors import RequestError
from sparing.pool.cleaning import Cleaning
from sparing.pool.copies.images import marks
from sparing.pool.growth import Growth
from sparing.pool.items import REASONS, Item
from sparing.pool.store import Store

Image: Any = pytest.importorskip("PIL.Image")
Enhance: Any = pytest.importorskip("PIL.ImageEnhance")
pytest.importorskip("imagehash")


def scene(seed: int, side: int = 96) -> Any:
    coarse = np.random.default_rng(seed).integers(0, 255, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def saved(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_a_hash_stays_through_size_and_compression_and_tells_others_apart() -> None:
    files = [
        saved(scene(0)),
        saved(scene(0), "JPEG", quality=60),
        saved(scene(0, 200)),
        *(saved(scene(seed)) for seed in range(1, 12)),
    ]
    found = marks([Item(key="", image=file) for file in files])
    apart = np.bitwise_count(found[:, None] ^ found[None])
    assert apart[0, :3].max() <= 6
    assert apart[0, 3:].min() > 12


def test_what_has_no_pattern_has_no_hash() -> None:
    flat = Image.fromarray(np.full((40, 40), 77, np.uint8))
    batch = [
        Item(key="flat", image=saved(flat)),
        Item(key="broken", image=b"junk"),
        Item(key="text", text="words"),
        Item(key="row", tensor=np.asarray(scene(0))),
        Item(key="tiny", image=saved(scene(0, 31))),
    ]
    assert marks(batch).tolist() == [0] * 5
    assert marks([Item(key="small", image=saved(scene(0, 32)))])[0] > 0


STRICT = Cleaning(copies=1e-6)


def copies(seed: int) -> list[bytes]:
    """A picture compressed, made small, and brightened with both."""
    image = scene(seed)
    small = image.resize((64, 64), Image.Resampling.LANCZOS)
    bright = Enhance.Brightness(small).enhance(1.05)
    return [saved(image, "JPEG", quality=70), saved(small), saved(bright, "JPEG", quality=80)]


@pytest.fixture(scope="module")
def batch() -> list[Item]:
    """20 pictures, three copies of each of the first 8, and what has no hash among them."""
    items = [Item(key=f"{seed}", image=saved(scene(seed))) for seed in range(20)]
    items += [
        Item(key=f"{seed} again {at}", image=file)
        for seed in range(8)
        for at, file in enumerate(copies(seed))
    ]
    tiny = [Item(key=f"tiny {side}", image=saved(scene(0, side))) for side in (20, 24)]
    return items + tiny


def groups(pool: Growth) -> dict[str, str]:
    """What stands for each item, by keys."""
    ids = pool.ids
    names = {int(i): item.key for i, item in zip(ids, pool.items(ids), strict=True)}
    owners = pool._members.groups.representatives(ids)
    return {names[int(i)]: names[int(j)] for i, j in zip(ids, owners, strict=True)}


def put(pool: Growth, batch: list[Item], order: Any, size: int) -> Growth:
    for at in range(0, len(batch), size):
        pool.add([batch[i] for i in order[at : at + size]])
    return pool


def test_copies_are_found_by_the_hash_where_the_vectors_are_too_far(batch: list[Item]) -> None:
    pool = Growth(encoder="pixels", clean=STRICT)
    added = pool.add(batch)
    told = {drop.key: drop for drop in added.drops}
    # the largest file of each picture stays
    owner = groups(pool)
    assert {name.split()[0] for name in told} == {str(seed) for seed in range(8)}
    assert len(told) == 24
    for seed in range(8):
        mine = {owner[name] for name in owner if name.split()[0] == str(seed)}
        assert len(mine) == 1
    assert all("perceptual hash" in drop.detail for drop in told.values())
    assert len(pool.kept()) == 22
    without = Growth(encoder="pixels", clean=Cleaning(copies=1e-6, image_hash=-1))
    without.add(batch)
    assert len(without.kept()) == len(batch)
    by_vector = Growth(encoder="pixels", clean=Cleaning(copies=0.05))
    drops = by_vector.add(batch).drops
    assert any("perceptual hash" not in drop.detail for drop in drops)


@pytest.mark.parametrize("size", [1, 7, 46])
def test_the_groups_do_not_depend_on_the_order(batch: list[Item], size: int) -> None:
    whole = groups(put(Growth(encoder="pixels", clean=STRICT), batch, range(len(batch)), 46))
    order = np.random.default_rng(size).permutation(len(batch))
    mixed = put(Growth(encoder="pixels", clean=STRICT), batch, order, size)
    assert groups(mixed) == whole
    kept = {item.key for item in mixed.items(mixed.kept())}
    assert kept == set(whole.values())


def test_hashes_are_stored_read_again_and_forgotten(batch: list[Item], tmp_path: Path) -> None:
    whole = groups(put(Growth(encoder="pixels", clean=STRICT), batch, range(len(batch)), 46))
    path = tmp_path / "pool"
    with Growth(path, encoder="pixels", clean=STRICT) as pool:
        put(pool, batch[::2], range(len(batch[::2])), 9)
    for again in (False, True):
        if again:  # without what was saved beside the store
            for file in (path / "growth").iterdir():
                file.unlink()
            (path / "growth").rmdir()
        with Growth(path, encoder="pixels", clean=STRICT) as pool:
            if not again:
                put(pool, batch[1::2], range(len(batch[1::2])), 11)
            assert groups(pool) == whole
    with Store.open(path) as store:
        held = store.column("image_hash")
        assert (held != 0).sum() == len(batch) - 2
    with Growth(path, encoder="pixels", clean=STRICT) as pool:
        owner = groups(pool)["3"]
        gone = [i for i in pool.ids if pool.items([i])[0].key == owner]
        others = [i for i in pool.ids if pool.items([i])[0].key.split()[0] == "3"]
        pool.forget(gone)
        left = [i for i in others if i not in gone]
        assert len(set(pool._members.groups.representatives(left))) == 1
        assert (pool.reasons[np.searchsorted(pool.ids, left)] == 0).sum() == 1
        pool.forget(left)
        added = pool.add([Item(key="new", image=copies(3)[0])])
        assert added.drops == ()
    with Store.open(path) as store:
        assert len(store.column("image_hash")) == len(batch) - 4 + 1


def test_a_decision_taken_back_finds_the_copies_that_came_meanwhile(batch: list[Item]) -> None:
    pool = Growth(encoder="pixels", clean=STRICT)
    pool.add(batch[:20])
    first = pool.find("outlier", factor=0.0)
    decision = type(first)(
        reason="outlier", ids=np.array([2]), before=np.array([0]), detail="by hand"
    )
    pool.apply(decision)
    assert pool.add(batch[26:29]).drops[0].detail != "item 2"
    pool.undo(decision)
    by_key = groups(pool)
    mine = {by_key[name] for name in by_key if name.split()[0] == "2"}
    assert len(mine) == 1
    reasons = dict(zip(pool.ids.tolist(), pool.reasons.tolist(), strict=True))
    assert sorted(reasons[i] for i in [2, 20, 21, 22]) == [0] + [REASONS.index("near copy")] * 3


def test_texts_and_tensors_are_not_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_items: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("sparing.pool.intake.marks", never)
    rows = np.random.default_rng(0).random((30, 3, 40, 40)).astype(np.float32)
    with Growth(tmp_path / "pool", encoder="pixels") as pool:
        pool.add(rows)
        assert pool._members._marks.size == 0
    with Store.open(tmp_path / "pool") as store:
        assert "image_hash" not in store.columns()


def test_too_many_bits_are_refused() -> None:
    with pytest.raises(RequestError, match="at most 7 bits"):
        Cleaning(image_hash=8)
    assert Cleaning(copies=-1).bits == -1
