"""Encoders that need nothing, what becomes of items that cannot be read, and decoding."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sparing.core.errors import RequestError
from sparing.pool.encoders import Encoder, UnreadableError, encode, encoder, unit
from sparing.pool.encoders.function import Function, digest
from sparing.pool.encoders.images import ImageError, picture
from sparing.pool.items import Item, Vectors


def png(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG", **options)
    return out.getvalue()


def noise(seed: int, side: int = 40) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def test_pixels_are_rows_of_length_one_and_near_for_near_copies() -> None:
    made = encoder("pixels")
    assert isinstance(made, Encoder)
    plain = noise(0)
    lighter = np.clip(plain.astype(int) + 6, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(plain).save(out, "JPEG", quality=80)
    others = [png(noise(seed)) for seed in range(1, 30)]
    files = [png(plain), png(lighter), out.getvalue(), png(noise(0, 90)), *others]
    found = encode(made, [Item(key=str(at), image=file) for at, file in enumerate(files)])
    assert found.vectors.main.shape == (33, made.dim)
    np.testing.assert_allclose(np.linalg.norm(found.vectors.main, axis=1), 1, atol=1e-5)
    distance = 1 - found.vectors.main @ found.vectors.main[0]
    assert distance[:4].max() < 0.02
    assert distance[4:].min() > 0.2


def test_pixels_give_files_and_tensors_the_same_vector() -> None:
    made = encoder("pixels")
    array = noise(3, 32)
    as_tensor = np.ascontiguousarray(array.transpose(2, 0, 1))
    scaled = (as_tensor / 255).astype(np.float32)
    batch = [Item(key="a", image=png(array)), Item(key="b", tensor=as_tensor)]
    found = made([*batch, Item(key="c", tensor=scaled)]).main
    np.testing.assert_allclose(found[1:], found[:1].repeat(2, 0), atol=0.01)


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28), (3, 4, 4), (7,), (2, 3, 5, 7), (2, 40)])
def test_pixels_take_tensors_of_any_shape(shape: tuple[int, ...]) -> None:
    drawn = np.random.default_rng(0).standard_normal((5, *shape)).astype(np.float32)
    found = encoder("pixels", dim=32)([Item(key="", tensor=row) for row in drawn]).main
    assert found.shape == (5, 32)
    assert np.isfinite(found).all()


def test_a_grey_image_has_a_direction_and_the_order_of_a_batch_does_not_matter() -> None:
    made = encoder("pixels")
    batch = [Item(key=str(v), image=png(np.full((9, 9), v, np.uint8))) for v in (0, 128, 255)]
    batch.append(Item(key="n", image=png(noise(1))))
    found = made(batch).main
    assert np.linalg.norm(found, axis=1).min() > 0.99
    np.testing.assert_array_equal(made(batch[::-1]).main[::-1], found)


def test_what_cannot_be_read_becomes_a_drop_with_its_reason() -> None:
    whole = png(noise(1, 200))
    batch = [
        Item(key="good", image=png(noise(0))),
        Item(key="cut", image=whole[: len(whole) // 2]),
        Item(key="bomb", image=bomb(30_000)),
        Item(key="text", text="no image"),
        Item(key="junk", image=b"junk"),
        Item(key="also good", tensor=np.ones((1, 8, 8), np.float32)),
        Item(key="empty", image=b""),
    ]
    found = encode(encoder("pixels"), batch)
    assert found.rows.tolist() == [0, 5]
    assert len(found.vectors.main) == 2
    told = {drop.key: drop.detail for drop in found.drops}
    assert {drop.reason for drop in found.drops} == {"unreadable"}
    assert "cut off" in told["cut"]
    assert "30000 x 30000 pixels" in told["bomb"] or "too many pixels" in told["bomb"]
    assert "no image in text" in told["text"]
    assert "known format" in told["junk"]
    assert "known format" in told["empty"]


def test_nothing_readable_and_nothing_at_all() -> None:
    for batch in ([], [Item(key="junk", image=b"junk")]):
        found = encode(encoder("pixels", dim=8), batch)
        assert found.vectors.main.shape == (0, 8)
        assert len(found.drops) == len(batch)


def test_pillows_own_limit_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too many pixels"):
        picture(png(noise(0, 40)))


def test_deep_grey_is_scaled_not_cut_and_transparent_becomes_white() -> None:
    deep = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    out = np.asarray(picture(png(deep)))
    np.testing.assert_array_equal(out[..., 0], deep >> 8)
    clear = np.zeros((4, 4, 4), np.uint8)
    assert np.asarray(picture(png(clear))).min() == 255
    palette = Image.fromarray(noise(0)).convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    assert picture(buffer.getvalue()).mode == "RGB"
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(buffer, "TIFF")
    with pytest.raises(ImageError, match="mode F"):
        picture(buffer.getvalue())


def test_exif_turns_and_animations_give_their_first_frame() -> None:
    array = noise(2, 20)[:10]
    image = Image.fromarray(array)
    tags = Image.Exif()
    tags[0x0112] = 6
    out = io.BytesIO()
    image.save(out, "PNG", exif=tags)
    np.testing.assert_array_equal(np.asarray(picture(out.getvalue())), np.rot90(array, -1))
    out = io.BytesIO()
    frames = [Image.fromarray(np.full((6, 6), v, np.uint8)) for v in (10, 200, 90)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(picture(out.getvalue())).max() == 10


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_damage_anywhere_is_told_or_does_no_harm(kind: str) -> None:
    out = io.BytesIO()
    Image.fromarray(noise(1, 24)).save(out, kind)
    whole = out.getvalue()
    assert picture(whole).size == (24, 24)
    drawn = np.random.default_rng(0)
    told = 0
    for at in range(60):
        broken = bytearray(whole)
        if at % 3 == 0:
            del broken[int(drawn.integers(len(whole))) :]
        else:
            # headers are the short part of a file, and the one where damage does most
            places = drawn.integers(0, 60 if at % 3 == 1 else len(whole), 3)
            for place in places.tolist():
                broken[place % len(whole)] = int(drawn.integers(256))
        try:
            assert picture(bytes(broken)).mode == "RGB"
        except ImageError as error:
            told += bool(str(error))
    assert told > 5


def test_a_function_of_tensors_is_an_encoder() -> None:
    made = encoder(lambda batch: batch.flatten(1) * 2, version="doubled")
    with pytest.raises(RequestError, match="after its first batch"):
        _ = made.dim
    rows = np.random.default_rng(0).standard_normal((600, 2, 3)).astype(np.float32)
    found = encode(made, [Item(key="", tensor=row) for row in rows])
    assert made.dim == 6
    assert made.version == "doubled"
    np.testing.assert_allclose(found.vectors.main, unit(rows.reshape(600, 6))[0], atol=1e-6)


def test_rows_without_a_direction_are_told() -> None:
    rows = np.ones((4, 3), np.float32)
    rows[1], rows[2, 0] = 0, np.nan
    found = encode(encoder(lambda x: x), [Item(key=str(at), tensor=r) for at, r in enumerate(rows)])
    assert found.rows.tolist() == [0, 3]
    assert [drop.key for drop in found.drops] == ["1", "2"]
    assert "zeros" in found.drops[0].detail
    assert "NaN" in found.drops[1].detail


def test_a_module_runs_in_evaluation_and_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Dropout(0.9))
    module[2].eval()
    made = Function(module)
    items = [Item(key="", tensor=np.ones((3, 2, 2), np.float32))] * 3
    found = made(items).main
    np.testing.assert_array_equal(found[0], found[1])
    assert module.training
    assert not module[2].training
    before = made.version
    with torch.no_grad():
        module[1].weight.add_(1)
    assert Function(module).version != before
    assert digest(len) != digest(max)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 3), nn.Dropout(0.9)

    def features(self, batch: torch.Tensor) -> torch.Tensor:
        return self.drop(self.layer(batch))


def test_a_method_of_a_module_is_run_and_told_apart_like_it() -> None:
    net = Net()
    made = encoder(net.features)
    items = [Item(key="", tensor=np.ones(4, np.float32))] * 2
    found = made(items).main
    np.testing.assert_array_equal(found[0], found[1])
    assert net.drop.training
    before, enclosed = made.version, digest(lambda x: net(x))
    with torch.no_grad():
        net.layer.bias.add_(1)
    assert encoder(net.features).version != before
    assert digest(lambda x: net(x)) != enclosed


def test_versions_of_functions_follow_their_constants() -> None:
    def times(factor: float) -> Any:
        return lambda x: x * factor

    assert digest(lambda x: x * 2) != digest(lambda x: x * 3)
    assert digest(times(2)) == digest(times(2)) != digest(times(3))


def test_a_callable_takes_images_when_told_their_size_and_texts_as_a_list() -> None:
    batch = [
        Item(key="a", image=png(noise(0)), text="one"),
        Item(key="b", image=png(noise(1)), text="2"),
    ]
    with pytest.raises(RequestError, match="side=224"):
        encoder(lambda x: x)(batch)
    both = encoder(
        lambda x: x.flatten(1), side=4, text=lambda texts: [[len(t)] * 48 for t in texts]
    )
    found = both(batch)
    assert found.main.shape == (2, 48)
    assert found.second is not None
    assert found.second[:, 0].tolist() == [3, 1]
    texts = encoder(lambda texts: np.array([[len(t), 1.0] for t in texts]))
    assert texts([Item(key="", text="abc")]).main.tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("items", "function", "match"),
    [
        (
            [Item(key="a", tensor=np.ones(2)), Item(key="b", tensor=np.ones(3))],
            lambda x: x,
            "one shape",
        ),
        ([Item(key="a", tensor=np.ones(2)), Item(key="b", text="t")], lambda x: x, "one kind"),
        ([Item(key="a", tensor=np.ones(2))] * 2, lambda x: x[:1], "1 rows for 2"),
        ([Item(key="a", tensor=np.ones(2))] * 2, lambda x: x[:, 0], r"shape \(2,\)"),
    ],
)
def test_wrong_callables_and_batches_are_refused(items: Any, function: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        encode(Function(function, version="v"), items)


def test_an_encoder_of_another_size_is_named() -> None:
    class Wrong:
        dim, version = 4, "wrong-1"

        def __call__(self, items: Any) -> Vectors:
            return Vectors(main=np.ones((len(items), 3), np.float32))

    with pytest.raises(RequestError, match=r"wrong-1 gave vectors of shape \(1, 3\)"):
        encode(Wrong(), [Item(key="", text="")])
    with pytest.raises(RequestError, match='did you mean "pixels"'):
        encoder("pixel")
    with pytest.raises(RequestError, match="a name"):
        encoder(3)  # type: ignore[arg-type]


def test_an_error_without_positions_of_the_batch_is_not_swallowed() -> None:
    def strange(batch: Any) -> Any:
        raise UnreadableError({7: "elsewhere"})

    with pytest.raises(UnreadableError):
        encode(Function(strange, version="", dim=2), [Item(key="", tensor=np.ones(2))])
