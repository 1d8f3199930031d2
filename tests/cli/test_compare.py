"""The compare command, presets, and minutes in plan."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

import sparing
from sparing.cli import app

NAME = "language-dynmoe"
TWO = """\
about: two small arms
task: {name: language, seq_len: 32, dim: 16, heads: 2, layers: 1, width: 24, domains: [shakespeare],
  eval_windows: 2, sample_bytes: 8, passage_bytes: 16}
train: {tokens: 2048, batch_size: 4, precision: fp32}
needs: [hf]
presets: {short: {train.tokens: 1024}}
compare: {baseline: plain, margin: +-0.5 bits_per_byte}
arms:
  plain: {}
  wide: {set: {task.width: 32}}
"""


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text(TWO)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_two_arms_by_two_seeds_in_their_own_processes():
    result = call("compare", "two.yaml", "--seeds", "1", "--preset", "short", "--out", "here",
                  "--jobs", "2", "--threads", "1", "--record", "records/two.json")  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert "plain, seed 0: started" in result.stderr
    assert result.stdout.splitlines()[-1] == "page: here/compare.html"
    assert "wide: NO VERDICT. " in result.stdout  # one seed has no interval
    recipe = yaml.safe_load(Path("here/wide/seed-0/recipe.yaml").read_text())
    assert (recipe["train"]["tokens"], recipe["train"]["threads"]) == (1024, 1)
    assert "presets" not in recipe
    assert "step 8/8" in Path("here/wide/seed-0.log").read_text()
    record = json.loads(Path("records/two.json").read_text())
    assert [run["state"] for run in record["results"]["arms"]["wide"]["runs"]] == ["finished"]
    # the commands on the page make the same runs
    told = sparing.compare("here").arm("wide").declared["command"]
    assert told == (
        "sparing run two.yaml --preset short -s task.width=32 -s train.precision=fp32 "
        "-s train.threads=1 -s seed=N --out here/wide/seed-N"
    )
    again = call(
        "compare", "two.yaml", "--seeds", "1", "--preset", "short", "--out", "here", "--json"
    )
    assert again.exit_code == 0
    assert "started" not in again.stderr
    assert json.loads(again.stdout)["arms"]["wide"]["runs"][0]["state"] == "finished"


@pytest.mark.slow
def test_a_killed_comparison_takes_its_runs_with_it_and_goes_on():
    source = str(Path(sparing.__file__).parents[1])
    command = [sys.executable, "-m", "sparing.cli", "compare", "two.yaml", "--seeds", "1", "--out",
               "here", "-s", "train.tokens=65536"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": source}
    process = subprocess.Popen(command, env=environment)
    log = Path("here/plain/seed-0/metrics.jsonl")
    until = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2.0)
    size = log.stat().st_size
    time.sleep(2.0)
    assert log.stat().st_size == size  # its run ended too
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "page: here/compare.html" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arms", "plain,wid"), 'unknown arm "wid"; did you mean "wide"?'),
        (("--arms", " , "), "--arms names no arm"),
        (("--arms", "wide"), 'the baseline "plain" is not among the arms wide'),
        (("--budget", "30"), '--budget "30" is no time; write 90s, 30m or 1.5h'),
        (("--margin", "0.02"), 'margin "0.02" has no '),
        (("--preset", "shor"), 'unknown preset "shor"; did you mean "short"?'),
        (("--seeds", "0"), "seeds must be at least 1, got 0"),
    ],
)
def test_wrong_requests_end_with_2_and_leave_nothing(arguments, message):
    result = call("compare", "two.yaml", *arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in result.stderr
    assert result.stdout == ""
    assert [entry.name for entry in Path().iterdir()] == ["two.yaml"]


def test_a_recipe_without_arms():
    Path("none.yaml").write_text(TWO.partition("compare:")[0])
    result = call("compare", "none.yaml")
    assert (result.exit_code, "declares no arms to compare" in result.stderr) == (2, True)


def test_presets_and_minutes_in_plan():
    result = call("plan", "two.yaml", "--preset", "short", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tokens"] == 1024
    assert found["seconds"]["total"] > found["seconds"]["step"] > 0
    assert [entry.name for entry in Path().iterdir()] == ["two.yaml"]


def test_the_shipped_recipe_declares_arms_that_are_right():
    from sparing.run.compare.arms import Asked, choose

    arms, compared = choose(Asked(recipe=NAME, out=Path("nowhere")))
    assert compared.baseline in [arm.name for arm in arms]
    assert [arm for arm in arms if arm.waits_for] == arms[-len([a for a in arms if a.waits_for]) :]
    assert all(arm.load(Asked(recipe=NAME, out=Path())) for arm in arms if arm.of is None)
