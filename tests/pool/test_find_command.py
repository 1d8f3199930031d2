"""``sparing pool find``: label issues and outliers of a store from the command line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from sparing.cli import app
from sparing.pool.cleaning import Cleaning
from sparing.pool.growth import Growth
from sparing.pool.store import Store


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def drawn(kind: int, seed: int) -> bytes:
    """A picture of its class, with noise; class 9 is like no other."""
    random = np.random.default_rng(1000 * kind + seed)
    coarse = np.random.default_rng(kind if kind < 9 else seed + 50).integers(0, 256, (4, 4, 3))
    wide = np.kron(coarse, np.ones((6, 6, 1))) + 25 * random.standard_normal((24, 24, 3))
    held = io.BytesIO()
    Image.fromarray(wide.clip(0, 255).astype(np.uint8)).save(held, "PNG")
    return held.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures in two classes: 3 of them in the wrong one, and 3 that are like none."""
    place = tmp_path_factory.mktemp("find")
    for kind in range(2):
        (place / "images" / f"{kind}").mkdir(parents=True)
    for seed in range(60):
        kind = seed % 2
        folder = 1 - kind if seed < 3 else kind
        (place / "images" / f"{folder}" / f"{seed:02d}.png").write_bytes(drawn(kind, seed))
    for seed in range(3):
        (place / "images" / "0" / f"odd{seed}.png").write_bytes(drawn(9, seed))
    grown = call("grow", place / "pool", place / "images", "--labels", "--threshold", "-1")
    assert grown.exit_code == 0, grown.output
    return place / "pool"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pool"))


@pytest.mark.parametrize(
    ("kind", "wanted", "reason"),
    [
        ("label-issues", {"1/00.png", "0/01.png", "1/02.png"}, "label issue"),
        ("outliers", {f"0/odd{seed}.png" for seed in range(3)}, "outlier"),
    ],
)
def test_what_is_found_is_listed_left_out_and_taken_back(
    store: Path, kind: str, wanted: set[str], reason: str
) -> None:
    found = json.loads(call("pool", "find", store, "--kind", kind, "--json").stdout)
    keys = {item["key"] for item in found["items"]}
    assert wanted <= keys
    assert len(keys) <= 8
    assert found["found"] == len(keys)
    assert found["kept"] == 63
    assert not found["applied"]
    assert {example["key"] for example in found["examples"]} <= keys
    with Store.open(store) as view:
        assert (view.column("reason") == 0).all()
    shown = call("pool", "find", store, "--kind", kind)
    assert shown.exit_code == 0
    assert "nothing was changed; --apply leaves them out" in shown.stdout
    assert any(key in shown.stdout for key in wanted)
    done = call("pool", "find", store, "--kind", kind, "--apply")
    assert f"left out; {63 - len(keys)} items are kept now" in done.stdout
    summary = json.loads(call("pool", "show", store, "--json").stdout)
    assert summary["dropped"] == {reason: len(keys)}
    assert summary["snapshots"][-1]["label"].endswith("--apply")
    assert reason in (store / "report.html").read_text()
    back = json.loads(call("pool", "find", store, "--kind", kind, "--undo", "--json").stdout)
    assert (back["found"], back["kept"], back["undone"]) == (len(keys), 63, True)
    assert "dropped" not in call("pool", "show", store, "--json").stdout.replace(
        '"dropped": {}', ""
    )
    assert call("pool", "check", store).exit_code == 0


def test_label_issues_say_which_class_is_likelier(store: Path) -> None:
    shown = call("pool", "find", store, "--kind", "label-issues").stdout
    line = next(line for line in shown.splitlines() if "1/00.png" in line)
    assert "label 1 has probability" in line
    assert "and 0 is likelier" in line
    assert "prune_by_class" in call(
        "pool", "find", store, "--kind", "label-issues", "--rule", "prune_by_class"
    ).stdout  # fmt: skip
    many = json.loads(
        call("pool", "find", store, "--kind", "outliers", "--factor", 0.1, "--json").stdout
    )
    assert many["found"] > 8


def test_wrong_requests_end_with_2_and_say_why(store: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("--kind", "label-issue"), 'did you mean "label-issues"'),
        (("--kind", "outliers", "--apply", "--undo"), "exclude each other"),
        (("--kind", "outliers", "--rule", "both"), "--rule says nothing with --kind outliers"),
        (("--kind", "outliers", "--undo", "--factor", 3), "--factor says nothing with --undo"),
        (("--kind", "label-issues", "--rule", "bth"), 'did you mean "both"'),
        (("--kind", "outliers", "--factor", -1), "factor"),
        ((), "--kind"),
    ):
        result = call("pool", "find", store, *arguments)
        assert result.exit_code == 2, arguments
        assert words in result.output + result.stderr
    missing = call("pool", "find", tmp_path / "none", "--kind", "outliers")
    assert missing.exit_code == 1
    assert "there is no store" in missing.stderr
    assert not (tmp_path / "none").exists()


def test_a_pool_without_labels_and_one_made_in_python(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((80, 8)).astype(np.float32)
    clean = Cleaning(copies=-1)
    with Growth(tmp_path / "pool", encoder="pixels", clean=clean, k=3) as pool:
        pool.add(rows)
    result = call("pool", "find", tmp_path / "pool", "--kind", "label-issues")
    assert result.exit_code == 2
    assert "give labels with the items" in result.stderr
    assert call("pool", "find", tmp_path / "pool", "--kind", "outliers").exit_code == 0
    with Growth(tmp_path / "pool", encoder="pixels", clean=clean, k=3) as pool:
        assert len(pool.kept()) == 80
    shutil.rmtree(tmp_path / "pool" / "growth")
    result = call("pool", "find", tmp_path / "pool", "--kind", "outliers")
    assert result.exit_code == 2
    assert "open it in Python" in result.stderr
