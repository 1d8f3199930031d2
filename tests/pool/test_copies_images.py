"""Perceptual hashes, pairs by them against brute force, and which copy is preferred."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from sparing.core.errors import RequestError
from sparing.pool.copies.greedy import Near, Traits
from sparing.pool.copies.images import alike, marks, quality
from sparing.pool.items import Item

Image: Any = pytest.importorskip("PIL.Image")
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
    as_tensor = np.asarray(scene(0)).transpose(2, 0, 1)
    tensors = [
        as_tensor,
        (as_tensor / 255).astype(np.float32),
        ((as_tensor / 255 - 0.5) / 0.2).astype(np.float32),
    ]
    other = marks([Item(key="", tensor=tensor) for tensor in tensors])
    assert np.bitwise_count(other ^ found[0]).max() <= 4


def test_what_has_no_pattern_has_no_hash() -> None:
    flat = Image.fromarray(np.full((40, 40), 77, np.uint8))
    batch = [
        Item(key="flat", image=saved(flat)),
        Item(key="broken", image=b"junk"),
        Item(key="text", text="words"),
        Item(key="row", tensor=np.ones(5)),
        Item(key="nan", tensor=np.full((1, 9, 9), np.nan)),
    ]
    assert marks(batch).tolist() == [0] * 5


@pytest.mark.parametrize("bits", [0, 1, 3, 7])
def test_pairs_equal_brute_force(bits: int) -> None:
    drawn = np.random.default_rng(bits)
    base = drawn.integers(1, 2**63, 60).astype(np.uint64)[drawn.integers(0, 60, 300)]
    flips = drawn.integers(0, 64, (300, 4)).astype(np.uint64)
    found = base.copy()
    for column in range(4):
        found ^= np.where(drawn.random(300) < 0.5, np.uint64(1) << flips[:, column], np.uint64(0))
    found[:5] = 0
    one, two = alike(found, bits)
    # equal ones are told as pairs with the first of their kind only
    first = {value: at for at, value in reversed(list(enumerate(found.tolist())))}
    expected = set()
    for a in range(300):
        for b in range(a + 1, 300):
            near = (int(found[a]) ^ int(found[b])).bit_count() <= bits
            if not near or found[a] == 0 or found[b] == 0:
                continue
            leads = {first[int(found[a])], first[int(found[b])]}
            if leads == {a, b} or (found[a] == found[b] and a in leads):
                expected.add((a, b))
    assert set(zip(one.tolist(), two.tolist(), strict=True)) == expected
    assert len(alike(np.zeros(4, np.uint64), bits)[0]) == 0


def test_a_mass_of_equal_hashes_stays_linear() -> None:
    one, _ = alike(np.full(200_000, 12345, np.uint64), 3)
    assert len(one) == 199_999
    assert set(one.tolist()) == {0}
    with pytest.raises(RequestError, match="at most 7"):
        alike(np.ones(2, np.uint64), 8)


def test_hashes_widen_the_distance_where_they_agree() -> None:
    angle = np.array([0.0, 0.3, 0.3])
    rows = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    traits = Traits(vectors=rows, marks=np.array([0b1, 0b11, 0b111110], np.uint64))
    table = Near(limit=0.01, bits=1, wide=0.1).table(traits, traits)
    assert table.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    with pytest.raises(RequestError, match="wide needs bits"):
        Near(limit=0.01, wide=0.1)


def test_more_pixels_then_longer_texts_are_preferred() -> None:
    small, large = saved(scene(0, 20)), saved(scene(0, 30))
    batch = [
        Item(key="", image=small, text="a long caption"),
        Item(key="", image=large, text="a"),
        Item(key="", image=large, text="a longer one"),
        Item(key="", image=b"junk"),
    ]
    assert np.argsort(quality(batch)).tolist() == [3, 0, 1, 2]
    words = quality([Item(key="", text="one"), Item(key="", text="three")])
    assert words.tolist() == [3, 5]
    assert quality([Item(key="", tensor=np.ones((2, 3)))]).tolist() == [6]
