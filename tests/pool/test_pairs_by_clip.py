"""Image-text pairs of a tar through a CLIP model's folder, by the command line, end to end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import Result
from PIL import Image
from tests.pool.made_sources import tar
from typer.testing import CliRunner

from sparing.cli import app
from sparing.pool.cleaning import Cleaning
from sparing.pool.growth import Growth
from sparing.pool.items import REASONS
from sparing.pool.sources import ingest, open_source
from sparing.pool.store import Store

COLOURS = {
    "red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 50, 220), "white": (240, 240, 240),
    "black": (15, 15, 15), "gold": (230, 220, 30), "pink": (240, 130, 200), "cyan": (40, 220, 220),
}  # fmt: skip
NAMES = tuple(COLOURS)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"{name}{side}" for name in NAMES for side in "lr")]
SIDE, SIZE, WRONG = 16, 240, 24
KEEPS_COPIES = Cleaning(copies=-1)


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def caption(kind: int) -> str:
    """Which of 64: what is left, and what is right."""
    return f"{NAMES[kind // 8]}l {NAMES[kind % 8]}r"


def pixels(kind: int, seed: int) -> Any:
    wide = np.empty((SIDE, SIDE, 3))
    wide[:, : SIDE // 2], wide[:, SIDE // 2 :] = COLOURS[NAMES[kind // 8]], COLOURS[NAMES[kind % 8]]
    noise = np.random.default_rng(seed).standard_normal(wide.shape)
    return (wide + 12 * noise).clip(0, 255).astype(np.uint8)


def trained(model: Any, tokens: Any) -> None:
    """A few steps, until a picture is nearer to its own caption than to most others."""
    said = tokens([caption(kind) for kind in range(64)], return_tensors="pt", padding=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        shown = np.stack([pixels(kind, 1000 + 64 * step + kind) for kind in range(64)])
        seen = torch.from_numpy(shown).permute(0, 3, 1, 2) / 255 - 0.5
        model(pixel_values=seen, **said, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CLIP model with random weights, and the same after a few steps."""
    place = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **small, "intermediate_size": 64, "vocab_size": len(WORDS),
            "max_position_embeddings": 8, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={**small, "intermediate_size": 64, "image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    made = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        for name in ("random", "trained"):
            folder = place / name
            folder.mkdir()
            (folder / "vocab.txt").write_text("\n".join(WORDS))
            tokens = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"))
            if name == "trained":
                trained(model, tokens)
            tokens.save_pretrained(folder)
            model.save_pretrained(folder)
            transformers.CLIPImageProcessor(
                size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
                image_mean=[0.5, 0.5, 0.5], image_std=[1.0, 1.0, 1.0],
            ).save_pretrained(folder)  # fmt: skip
            made.append(folder)
    return made[0], made[1]


def shard(path: Path) -> Path:
    """SIZE pairs; every tenth has the caption of a picture with no colour in common."""
    members = []
    for number in range(SIZE):
        kind = number * 37 % 64
        said = (kind + 27) % 64 if number % 10 == 9 else kind
        held = io.BytesIO()
        Image.fromarray(pixels(kind, number)).save(held, "PNG")
        members += [
            (f"{number:04d}.png", held.getvalue()), (f"{number:04d}.txt", caption(said).encode())
        ]  # fmt: skip
    return tar(path, members)


class Stopped(Exception):
    """In the place of a user's interrupt."""


def stop(*_: Any) -> None:
    raise Stopped


def reasons(store: Path) -> dict[str, str]:
    with Store.open(store) as view:
        keys, held = view.column("key"), view.column("reason")
        return {str(k).split(":")[1]: REASONS[r] for k, r in zip(keys, held, strict=True)}


def test_wrong_pairs_of_a_tar_are_dropped_and_a_restart_goes_on(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    source, store = shard(tmp_path / "pairs.tar"), tmp_path / "pool"
    options = ("--encoder", folders[1], "--threshold", "-1", "--batch", 120)
    result = call("grow", store, source, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    told = reasons(store)
    assert len(told) == SIZE
    wrong = {key for key in told if int(key) % 10 == 9}
    assert len(wrong) == WRONG
    out = {key for key, reason in told.items() if reason == "misaligned"}
    assert len(out & wrong) >= 0.9 * WRONG
    assert len(out - wrong) <= 0.05 * (SIZE - WRONG)
    assert found["dropped"] == {"misaligned": len(out)}
    page = (store / "report.html").read_text()
    assert "image and text do not belong together" in page
    assert page.count("data:image/png;base64,") >= 10
    # a run that was stopped after its first batch goes on
    half = tmp_path / "half"
    with pytest.raises(Stopped), Growth(half, encoder=folders[1], clean=KEEPS_COPIES) as growth:
        ingest(growth, [open_source(source)], batch=120, told=stop)
    assert len(reasons(half)) == 120
    again = call("grow", half, source, *options, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["now"]["read"] == SIZE - 120
    same = [told[key] == reason for key, reason in reasons(half).items()]
    assert len(same) == SIZE
    assert np.mean(same) > 0.97  # the threshold was calibrated on a sample of another draw
    # the options need not be given again
    twice = json.loads(call("grow", store, source, "--json").stdout)
    assert (twice["now"]["read"], twice["dropped"]) == (0, found["dropped"])


def test_a_model_that_cannot_tell_drops_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source = shard(tmp_path / "pairs.tar")
    result = call("grow", tmp_path / "pool", source, "--encoder", folders[0], "--threshold", "-1")
    assert result.exit_code == 0, result.output
    assert set(reasons(tmp_path / "pool").values()) == {"kept"}
    other = call("grow", tmp_path / "pool", source, "--encoder", folders[1])
    assert other.exit_code == 2
    assert "vectors of two encoders cannot be compared" in other.stderr
