"""The page of a training set that grew: counts that add up, and what was planted against found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparing.core.errors import RequestError
from sparing.run import runner
from sparing.run.recipe import load
from sparing.run.report import grown
from sparing.run.report.read import Run, read

NAMES = ["kept", "same content", "near copy", "misaligned", "label issue", "outlier"]


def run_of(page: dict) -> Run:
    return Run(name="x", summary={}, page=page, recipe="", train=[], evals=[], events=[], notes=[])


def growth(reasons: str, trained: str, copies: list[list[int]]) -> dict:
    counts = {NAMES[int(d)]: reasons.count(d) for d in set(reasons)}
    return {
        "size": len(reasons),
        "trained": trained.count("1"),
        "names": NAMES,
        "reasons": counts,
        "tenths": [{"gain": None, "trained": 0.5, "dropped": 0.0}] * 10,
        "points": [[0.0, 1.0, 0], [1.0, 0.0, -1], [0.5, 0.5, 4], [0.1, 0.1, 2], [0.2, 0.1, 5]],
        "each": {"reasons": reasons, "trained": trained, "copies": copies},
    }


def test_without_a_grown_set_there_is_no_section():
    assert grown.grown(run_of({})) is None


def test_precision_and_recall_are_those_of_pairs_and_of_labels():
    # planted: {0, 1, 2} and {5, 6}; found: {0, 1} and {6, 7}; wrong: 2, 3, 8, 1, doubted: 3, 4
    page = {
        "growth": growth("0200440200", "1000000010", [[0, 1], [6, 7]]),
        "planted": {"copies": [[0, 1, 2], [5, 6]], "wrong": [2, 3, 8, 1]},
    }
    found = grown.grown(run_of(page))
    assert found is not None
    pairs, labels, kept = found["found"]
    assert pairs[1:3] == ("4", "2")
    assert [cell.replace("\N{NARROW NO-BREAK SPACE}", "") for cell in pairs[3:]] == ["50%", "25%"]
    # sample 1 went as a copy, so that nobody could doubt its label; 4 and 5 were doubted
    assert labels[1:3] == ("3", "2")
    assert labels[3][0] == "0"
    assert kept[2].startswith("1 (50")
    told = {name: count for name, count, _ in found["rows"]}
    assert told["trained on"] == "2"
    assert told["clean, left out"] == "4"
    assert told["dropped: near copy"] == told["dropped: label issue"] == "2"
    # the points: one of each kind, and no gain is known by any tenth
    assert {style.split()[0] for _, style in found["map"].paths} == set(grown.STYLES.values())
    assert [c.key for c in found["tenths"]] == ["growth-trained"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("growth") / "run"
    recipe = load("growth-vision", ["train.epochs=2", "train.precision=fp32"], smoke=True)
    runner.run(recipe, out)
    return out


def test_the_recipe_runs_and_its_page_tells_what_became_of_each_sample(finished):
    held = json.loads((finished / "page.json").read_text(encoding="utf-8"))
    each = held["growth"]["each"]
    assert len(each["reasons"]) == len(each["trained"]) == held["growth"]["size"] == 2160
    assert each["trained"].count("1") == held["growth"]["trained"] == 540
    section = grown.grown(read(finished))
    assert section is not None
    assert sum(int(count.replace(",", "")) for _, count, _ in section["rows"]) == 2160
    pairs, labels, _ = section["found"]
    # what "pixels" can find: all copies but those that were moved, nine wrong labels in ten
    assert int(pairs[3][:-2]) > 90
    assert 60 < int(pairs[4][:-2]) < 95
    assert int(labels[4][:-2]) > 80
    assert "in truth" in (finished / "report.html").read_text(encoding="utf-8")
    text = (finished / "report.html").read_text(encoding="utf-8")
    for heading in ("How the training set grew", "Kept, of the highest gain", "near copy, each"):
        assert heading in text
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert summary["ledger"]["samples"] == {"spent": 1080, "dense": 4320}
    assert summary["methods"]["growth"]["label_issue"] > 300


def test_arms_share_their_data_and_nothing_else_is_changed():
    recipe = load("growth-vision")
    assert {"everything", "growth", "published", "random"} <= set(recipe.arms)
    for arm in recipe.arms.values():
        assert all(key.startswith("methods.growth") for key in arm.set)
    with pytest.raises(RequestError, match="noise_labels=uniform"):
        load("growth-vision", ["task.noise_labels=human"]).build_task()
