"""``sparing grow`` and ``sparing pool`` end to end."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from tests.forked import script
from tests.pool.made_sources import bomb, lines, tar
from typer.testing import CliRunner

from sparing.cli import app, pool_page, pool_pictures
from sparing.pool.cleaning import Cleaning
from sparing.pool.encoders import encoder
from sparing.pool.growth import Growth
from sparing.pool.items import Item, Vectors
from sparing.pool.sources import account, ingest, open_source
from sparing.pool.store import Store


class Letters:
    """How often each letter occurs in a text."""

    dim, version = 27, "letters-1"

    def __call__(self, items: Any) -> Vectors:
        counted = [[(item.text or "").count(chr(97 + at)) for at in range(26)] for item in items]
        return Vectors(main=np.array([[*row, 1] for row in counted], np.float32))


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def noise(seed: int, form: str = "PNG") -> bytes:
    """A picture like no other: coloured noise in a few large squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    held = io.BytesIO()
    Image.fromarray(np.repeat(np.repeat(squares, 6, 0), 6, 1)).save(held, form)
    return held.getvalue()


def shards(path: Path) -> list[Path]:
    """Pictures in a tar and in a folder, with copies and damage among them."""
    members = [(f"{number:03d}.png", noise(number)) for number in range(30)]
    members += [("copy.png", noise(4)), ("hurt.png", b"\x89PNG"), ("big.png", bomb(9999, 9999))]
    first = tar(path / "a.tar", members)
    place = path / "folder"
    place.mkdir()
    for number in range(20, 55):
        (place / f"{number}.png").write_bytes(noise(number))
    cut = noise(70)
    (place / "cut.png").write_bytes(cut[: len(cut) // 2])
    (place / "again.bmp").write_bytes(noise(5, "BMP"))
    return [first, place]


@pytest.fixture
def grown(tmp_path: Path) -> tuple[Path, Result]:
    store = tmp_path / "pool"
    result = call("grow", store, *shards(tmp_path), "--drops", tmp_path / "drops.jsonl")
    assert result.exit_code == 0, (result.output, result.exception)
    return store, result


def test_grow_tells_what_became_of_each_item(grown: tuple[Path, Result], tmp_path: Path):
    store, result = grown
    assert "a.tar ..." in result.stderr
    assert "folder ..." in result.stderr
    assert "now: 70 items read, 56 stored" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "drops.jsonl").read_text().splitlines()]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reasons.setdefault(row["reason"], []).append(row["key"])
        assert row["detail"]
    assert reasons["same content"] == ["a.tar:copy", *(f"{n}.png" for n in range(20, 30))]
    assert sorted(reasons["unreadable"]) == ["a.tar:big", "a.tar:hurt", "cut.png"]
    assert reasons["near copy"] in (["again.bmp"], ["a.tar:005"])
    copy = next(row for row in rows if row["reason"] == "near copy")
    assert "stands for it, at distance 0.0000" in copy["detail"]
    found = json.loads(call("pool", "show", store, "--json").stdout)
    assert found["stored"] == 56
    assert found["kept"] == 55
    assert found["dropped"] == {"near copy": 1, "same content": 11, "unreadable": 3}
    assert sum(tenth["kept"] for tenth in found["tenths"]) == 55
    assert all(tenth["gain"] > 0 for tenth in found["tenths"])
    assert [source["items"] for source in found["sources"]] == [30, 26]
    shown = call("pool", "show", store).stdout
    assert "near copy                  1" in shown
    assert "snapshot 1: 56 items" in shown


def test_the_page_shows_examples_and_runs_nothing(grown: tuple[Path, Result]):
    store, _ = grown
    page = (store / "report.html").read_text()
    assert "55 of 56 kept" in page
    assert page.count("data:image/png;base64,") >= 10
    assert "<script" not in page
    assert "built-in" not in page  # a dictionary's method in place of what it holds
    assert "cut.png" in page
    assert "oversized" in page
    assert "One group of near copies, 2 items;" in page
    assert "0.0000 away" in page
    assert "an epoch over what is kept takes 55 of the 70 items that arrived" in page


def test_the_page_has_a_map_of_kept_and_dropped_items(tmp_path: Path):
    store = tmp_path / "pool"
    sources = shards(tmp_path)
    assert call("grow", store, *sources, "--budget", 20).exit_code == 0
    page = (store / "report.html").read_text()
    drawn = page.split("What is covered")[1].split("</section>")[0]
    assert "56 of 56 items" in drawn
    assert [part.split("<")[0].strip() for part in drawn.split("</b>")[1:]] == [
        "kept 20", "near copy 1", "evicted 35"
    ]  # fmt: skip
    paths = re.findall(r'class="(c\d) dots" d="([^"]*)"', drawn)
    assert {style: path.count("M") for style, path in paths} == {"c1": 20, "c2": 1, "c4": 35}
    with Store.open(store) as view:
        rows = view.vectors().astype(np.float64)
        alive = view.alive
    share = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    assert f"the first direction, {share[0] / share.sum():.0%} of the variance" in drawn
    # the dots lie as the plainest projection has them, up to its sign
    _, _, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    first = rows[alive] @ axes[0]
    shown = [float(x) for x in re.findall(r"M([\d.]+) ", dict(paths)["c1"])]
    assert abs(np.corrcoef(first, shown)[0, 1]) > 0.999


def test_groups_of_copies_are_shown_from_the_largest_to_the_smallest(tmp_path: Path):
    texts = [f"{name * 60} word{dot}" for name in "az" for dot in (".", "!", "?")]
    texts += [f"story of {name * 20}" for name in "klmn"]
    with Growth(tmp_path / "pool", encoder=Letters(), clean=Cleaning(copies=0.01)) as growth:
        growth.add([Item(key=str(at), text=text) for at, text in enumerate(texts)])
        growth.forget([int(growth._members.groups.representatives([0])[0])])
        growth.snapshot()
    with Store.open(tmp_path / "pool") as view:
        page = pool_page.write(view, tmp_path / "pool", account.summary(view))
        words, groups = pool_pictures.copies(view)
    assert words.startswith("2 groups of near copies, 5 items;")
    assert [len(group) for group in groups] == [3, 2]
    assert all("away" in told for group in groups for _, told in group[1:])
    assert page is not None
    assert "zzz word" in page.read_text().split("Copies that were found")[1]


def test_what_is_hostile_is_escaped_in_the_page(tmp_path: Path):
    place = tmp_path / "images"
    place.mkdir()
    (place / "<script>alert(1)<&>.png").write_bytes(b"hurt")
    (place / "<img src=x>.png").write_bytes(noise(1))
    assert call("grow", tmp_path / "pool", place).exit_code == 0
    page = (tmp_path / "pool" / "report.html").read_text()
    assert "<script>" not in page
    assert "<img src=x>" not in page
    assert "&lt;script&gt;" in page


def test_the_same_command_again_reads_nothing(grown: tuple[Path, Result], tmp_path: Path):
    store, _ = grown
    sources = [tmp_path / "a.tar", tmp_path / "folder"]
    again = json.loads(call("grow", store, *sources, "--json").stdout)
    assert again["now"] == {"read": 0, "stored": 0, "dropped": {}, "sources": 2, "evicted": 0}
    assert again["stored"] == 56
    assert len(again["snapshots"]) == 1
    (tmp_path / "folder" / "zzz.png").write_bytes(noise(99))
    again = json.loads(call("grow", store, *sources, "--json").stdout)
    assert (again["now"]["read"], again["stored"]) == (1, 57)
    (tmp_path / "folder" / "000.png").write_bytes(noise(98))
    changed = call("grow", store, *sources)
    assert changed.exit_code == 2
    assert "changed since it was last read" in changed.stderr
    assert "--reread" in changed.stderr
    again = json.loads(call("grow", store, *sources, "--json", "--reread").stdout)
    assert (again["now"]["stored"], again["stored"]) == (1, 58)


def test_image_hashes_find_what_a_strict_threshold_does_not(tmp_path: Path):
    place = tmp_path / "images"
    place.mkdir()
    for number in range(6):
        coarse = np.random.default_rng(number).integers(0, 255, (7, 7, 3), np.uint8)
        scene = Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)
        scene.save(place / f"{number}.png")
        scene.resize((64, 64)).save(place / f"{number}.jpg", quality=80)
    usual = ("--threshold", "0.000001", "--drops", tmp_path / "drops.jsonl", "--json")
    found = json.loads(call("grow", tmp_path / "pool", place, *usual).stdout)
    assert (found["kept"], found["dropped"]) == (6, {"near copy": 6})
    rows = [json.loads(line) for line in (tmp_path / "drops.jsonl").read_text().splitlines()]
    assert all("of 64 bits of their image hashes differ" in row["detail"] for row in rows)
    without = json.loads(
        call("grow", tmp_path / "other", place, *usual, "--image-hash", "-1").stdout
    )
    assert without["kept"] == 12
    again = json.loads(call("grow", tmp_path / "pool", place, "--json").stdout)
    assert again["kept"] == 6
    wrong = call("grow", tmp_path / "pool", place, "--image-hash", "9")
    assert wrong.exit_code == 2
    assert "at most 7 bits" in wrong.stderr


def test_a_budget_is_kept(tmp_path: Path):
    sources = shards(tmp_path)
    found = json.loads(call("grow", tmp_path / "pool", *sources, "--budget", 20, "--json").stdout)
    assert (found["kept"], found["dropped"]["evicted"]) == (20, 35)
    assert found["now"]["evicted"] == 35
    again = json.loads(call("grow", tmp_path / "pool", *sources, "--budget", 20, "--json").stdout)
    assert (again["kept"], again["now"]["evicted"]) == (20, 0)


def test_options_are_remembered(tmp_path: Path):
    (source, _) = shards(tmp_path)
    store = tmp_path / "pool"
    assert call("grow", store, source, "--threshold", -1, "--k", 2).exit_code == 0
    assert json.loads((store / "grow.json").read_text())["threshold"] == -1
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "again.bmp").write_bytes(noise(5, "BMP"))
    found = json.loads(call("grow", store, tmp_path / "more", "--json").stdout)
    assert "near copy" not in found["dropped"]
    assert json.loads((store / "grow.json").read_text())["k"] == 2
    (store / "grow.json").write_text('{"format": 99}')
    newer = call("grow", store, source)
    assert newer.exit_code == 1
    assert "newer version" in newer.stderr
    (store / "grow.json").write_text("{")
    assert "is damaged" in call("grow", store, source).stderr


def test_texts_need_another_encoder_and_are_not_read_to_the_end(tmp_path: Path):
    place = lines(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(5000)])
    result = call("grow", tmp_path / "pool", place)
    assert result.exit_code == 1
    assert "none of 1024 items can be read and encoded by" in result.stderr
    assert "a.jsonl:1" in result.stderr
    assert "--encoder" in result.stderr
    assert not (tmp_path / "pool").exists()


def test_damage_before_the_first_good_item_is_told(tmp_path: Path):
    empty = tar(tmp_path / "a.tar", [(f"{n}.png", b"hurt") for n in range(5)])
    good = tmp_path / "good"
    good.mkdir()
    (good / "0.png").write_bytes(b"hurt")
    (good / "1.png").write_bytes(noise(1))
    found = json.loads(call("grow", tmp_path / "pool", empty, good, "--batch", 1, "--json").stdout)
    assert (found["stored"], found["dropped"]) == (1, {"unreadable": 6})
    again = json.loads(call("grow", tmp_path / "pool", empty, good, "--json").stdout)
    assert again["now"]["read"] == 0
    nothing = call("grow", tmp_path / "other", empty)
    assert nothing.exit_code == 1
    assert "nothing was stored" in nothing.stderr


def test_requests_that_are_wrong(tmp_path: Path):
    sources = shards(tmp_path)
    store = tmp_path / "pool"
    for arguments, words in (
        ((store, tmp_path / "none.tar"), "there is no source at"),
        ((store, sources[0], "--encoder", "pixel"), 'did you mean "pixels"'),
        ((store, sources[0], "--budget", 0), "--budget must be at least 1"),
        ((store, sources[0], sources[0]), "is given twice"),
        ((sources[0], sources[1]), "is a file; the pool needs a directory"),
        ((tmp_path, sources[0]), "lies in the pool"),
        ((store, sources[0], "--kind", "tars"), "unknown kind of source"),
        ((store, sources[0], "--threshold", 3), "must be in [-1, 2]"),
    ):
        result = call("grow", *arguments)
        assert result.exit_code == 2, (arguments, result.output, result.exception)
        assert words in result.stderr
        assert not store.exists()


def test_a_second_writer_is_told(grown: tuple[Path, Result], tmp_path: Path):
    store, _ = grown
    with Growth(store, encoder="pixels"):
        result = call("grow", store, tmp_path / "a.tar")
    assert result.exit_code == 1
    assert str(os.getpid()) in result.stderr


def test_pool_check_compact_backup(grown: tuple[Path, Result], tmp_path: Path):
    store, _ = grown
    assert call("pool", "check", store).stdout == f"{store} is sound\n"
    assert json.loads(call("pool", "compact", store, "--json").stdout)["store"] == str(store)
    out = tmp_path / "copy"
    assert call("pool", "backup", store, out).exit_code == 0
    assert call("pool", "backup", store, out).exit_code == 2
    for place in (store, out):
        assert json.loads(call("pool", "check", place, "--json").stdout)["sound"] is True
    copied = json.loads(call("pool", "show", out, "--json").stdout)
    assert copied["stored"] == 56
    assert (out / "grow.json").read_text() == (store / "grow.json").read_text()
    shard = next((store / "payload").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    result = call("pool", "check", store, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"]
    for command in ("check", "compact", "show"):
        result = call("pool", command, tmp_path / "none")
        assert result.exit_code == 1
        assert "there is no store at" in result.stderr


def test_a_stream_and_sources_share_a_pool(tmp_path: Path):
    sources = [open_source(path) for path in shards(tmp_path)]
    with Growth(encoder="pixels") as growth:
        growth.add([Item(key="mine", image=noise(4))], source="mine")
        found = ingest(growth, sources, batch=7)
        assert found.read == 70
        assert found.stored == 55  # one of them is known by the stream
        assert not ingest(growth, sources).read
        assert growth.report()["stored"] == 56


def letters(texts: list[str]) -> torch.Tensor:
    """How often each letter is in a text: near copies are near."""
    return torch.tensor([[1.0 + text.count(chr(97 + n)) for n in range(26)] for text in texts])


def test_texts_and_their_page(tmp_path: Path):
    said = [f"{'abcdefghij'[n % 10] * (3 + n // 10)} <i>words</i>" for n in range(40)]
    rows = [{"text": text, "id": f"row {n}"} for n, text in enumerate(said)]
    rows += [{"text": f"{said[7]}.", "id": "copy"}, {"text": "", "id": "empty"}]
    rows += [{"text": "abacus words", "id": "row 3"}]
    store = tmp_path / "pool"
    with Growth(store, encoder=encoder(letters, dim=26, version="letters")) as growth:
        found = ingest(growth, [open_source(lines(tmp_path / "a.jsonl", rows))], batch=10)
        growth.snapshot()
    assert found.to_dict()["dropped"]["unreadable"] == 1
    with Store.open(store) as view:
        told = account.summary(view)
        assert pool_page.write(view, store, told) == store / "report.html"
        why = {row["key"]: row for row in account.dropped(view)}
    assert told["same_key_other_content"] == 1
    assert "caption is empty" in why["empty"]["detail"]
    copies = [row for row in why.values() if row["reason"] == "near copy"]
    assert len(copies) == told["dropped"]["near copy"] >= 1
    assert all("stands for it, at distance" in row["detail"] for row in copies)
    page = (store / "report.html").read_text()
    assert "&lt;i&gt;words" in page
    assert "<i>words" not in page
    assert "1 stored items have a key" in page
    assert call("pool", "show", store).exit_code == 0


@pytest.mark.parametrize(
    "only",
    [
        ("not killed", "in batch 3"),
        pytest.param((), marks=pytest.mark.slow),  # at every point
    ],
)
def test_killed_anywhere_the_same_command_goes_on_to_the_same_pool(
    only: tuple[str, ...], tmp_path: Path
):
    sources = shards(tmp_path)
    killed = Path(__file__).with_name("killed_grow.py")
    said = script(killed, tmp_path / "pools", ",".join(only), *sources, seconds=900)
    found = json.loads(said.splitlines()[-1])
    usual = found.pop("not killed")
    assert usual.pop("first") == 0
    usual.pop("again")
    assert len(usual["ids"]) == 56
    assert usual["reasons"].count(0) == 40
    assert usual["problems"] == []
    assert len(found) == (len(only) - 1 if only else 10)
    for name, pool in found.items():
        assert pool.pop("first") == -signal.SIGKILL, name
        assert pool.pop("again") == 0, name
        assert pool == usual, name
