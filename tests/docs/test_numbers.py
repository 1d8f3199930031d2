"""docs/numbers.md is what the committed records give."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
numbers = runpy.run_path(str(ROOT / "benchmarks" / "write_numbers.py"))


def test_the_committed_page_is_what_the_records_give():
    committed = (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert committed == numbers["page"](), "run: python benchmarks/write_numbers.py"


def test_every_record_is_on_the_page_and_has_its_script():
    page = numbers["page"]()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^bench-%:", makefile, re.M)
    for file in (ROOT / "benchmarks" / "records").glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        assert f"## {record['name']}\n" in page
        script = re.search(r"benchmarks/\w+\.py", record["command"])
        if script:
            assert (ROOT / script[0]).is_file(), record["command"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (True, "yes"),
        (None, "-"),
        ([1, 2.0], "1, 2"),
        ({"min": 1.0, "median": 2.0, "max": 3.5, "n": 5}, "2 (1 to 3.5), n = 5"),
    ],
)
def test_figures_in_words(value, text):
    assert numbers["shown"](value) == text


def test_a_comparison_shows_every_seed_and_what_is_missing(tmp_path):
    record = {
        "name": "mine", "kind": "comparison", "command": "sparing compare x", "when": "2026-01-02T",
        "machine": {"device": "cpu", "cores": 2, "python": "3.11", "torch": "2.13"},
        "results": {
            "recipe": "x", "metric": {"name": "bits_per_byte"}, "baseline": "a",
            "margin": "±0.02 bits_per_byte", "warnings": ["other code"], "missing": ["b, seed 1"],
            "arms": {
                "a": {"mean": 2.0, "costs": {"flops": 3e12}, "judgement": None,
                      "runs": [{"seed": 0, "state": "finished", "value": 2.0}]},
                "b": {"mean": 2.1, "costs": {}, "runs": [
                    {"seed": 0, "state": "finished", "value": 2.1},
                    {"seed": 1, "state": "diverged"}],
                      "judgement": {"verdict": "undecided", "paired": {
                          "estimate": 0.1, "low": -0.1, "high": 0.3}}},
            },
        },
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(record))
    page = numbers["page"](tmp_path)
    assert "| a | 2.0000 | 2.000 | 3.00 | - | baseline |" in page
    assert (
        "| b | 2.1000 | 2.100, 1: diverged | - | +0.1000 [-0.1000, +0.3000] | undecided |" in page
    )
    assert "- other code\n- b, seed 1\n" in page


def test_alike_branches_are_one_table():
    spread = {"min": 1.0, "median": 2.0, "max": 3.0}
    blocks = list(numbers["figures"]({"times": {"one": {"wall": spread}, "two": {"wall": spread}},
                                      "of": "layers"}))  # fmt: skip
    assert blocks == [
        ["- of: layers"],
        ["**times**", "", "|  | wall |", "| --- | --- |", "| one | 2 (1 to 3) |",
         "| two | 2 (1 to 3) |"],
    ]  # fmt: skip
