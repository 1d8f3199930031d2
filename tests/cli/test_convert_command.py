"""``sparing convert`` on the trained model that is shipped, end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from tests.convert.dense import STORIES, load
from typer.testing import CliRunner

from sparing.cli import app
from sparing.cli.common import one_place

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big tree with a red ball on it. "
)


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_dry_run_plans_and_writes_nothing(tmp_path: Path):
    result = call(STORIES, tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["form"] == "mixtral"
    assert found["blocks"] == 5
    assert found["expert_width"] == 24  # 172 / 8 is 21.5: four of 22, filled up to 16 bytes
    assert found["parameters"]["dense"] == 260_032
    assert list(tmp_path.iterdir()) == []
    words = call(STORIES, tmp_path / "out", "--dry-run").stdout
    assert "AutoModelForCausalLM" in words
    assert "260,032" in words


def test_convert_load_generate_and_back(tmp_path: Path):
    out, back = tmp_path / "out", tmp_path / "back"
    result = call(STORIES, out, "--experts", 4, "--active", 2)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "each hidden unit is in exactly one expert" in result.stdout
    assert "writing ..." in result.stderr
    assert "AutoModelForCausalLM" in result.stderr  # before the work, not only after it
    assert "| experts | 265,152 |" in (out / "README.md").read_text()
    assert (out / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".out*"))
    model = load(out)
    start = torch.tensor([[1, 403, 407]])
    wanted = model.generate(start, max_new_tokens=12, do_sample=False, use_cache=True)
    plain = model.generate(start, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(wanted, plain)
    put = call(out, back, "--to-dense", "--json")
    assert put.exit_code == 0, put.output
    assert json.loads(put.stdout)["exact"] is True
    dense = load_file(STORIES / "model.safetensors")
    again = load_file(back / "model.safetensors")
    assert again.keys() == dense.keys()
    assert all(torch.equal(again[name], dense[name]) for name in dense)


def test_a_fitted_conversion_is_nearer_to_the_dense_model(tmp_path: Path):
    text = tmp_path / "stories.txt"
    text.write_text(TEXT * 8)
    kinds = {
        "published": ("--gate", "random"),
        "fitted": ("--method", "coactivation", "--text", text, "--sequences", 8, "--length", 64),
    }
    losses = {}
    for name, options in kinds.items():
        out = tmp_path / name
        result = call(STORIES, out, "--experts", 4, "--active", 2, *options, "--quiet")
        assert result.exit_code == 0, (result.output, result.exception)
        assert result.stderr == ""
        model = load(out)
        from transformers import AutoTokenizer

        ids = torch.tensor([AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"]])
        with torch.no_grad():
            losses[name] = float(model(input_ids=ids, labels=ids).loss)
    assert losses["fitted"] < losses["published"] - 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--active", 9), "active must be at most experts (8), got 9"),
        (("--method", "gradien"), 'did you mean "gradient"'),
        (("--experts", 200, "--active", 2), "172 hidden units cannot be cut into 200"),
        (("--scale", "-1"), "scale must be at least 1e-06"),
        (("--block", "up=a"), "lacks down, act"),
        (("-s", "k"), "sets nothing"),
    ],
)
def test_wrong_requests(arguments: tuple[Any, ...], message: str, tmp_path: Path):
    result = call(STORIES, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "error: " in result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from sparing.convert import writing
from sparing.convert import Conversion, convert
seen = []
def slow(stage, done, total):
    if stage == "writing":
        seen.append(done)
        if len(seen) == 3:  # something is written, something is not
            print("writing", flush=True)
            time.sleep(600)
convert(sys.argv[1], sys.argv[2], Conversion(experts=4, active=2), told=slow)
"""


def test_a_kill_in_mid_conversion_leaves_no_half_result(tmp_path: Path):
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(STORIES), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not out.exists()
    assert (tmp_path / ".out.writing").is_dir()
    result = call(STORIES, out, "--experts", 4, "--quiet")
    assert result.exit_code == 0, result.output
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


def test_the_plan_is_told_once_where_both_streams_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    head, found = "feed-forward blocks of 172", "each hidden unit is in exactly one expert"
    apart = call(STORIES, tmp_path / "apart", "--experts", 4)
    assert (head in apart.stderr, head in apart.stdout, found in apart.stdout) == (True,) * 3
    monkeypatch.setattr("sparing.cli.convert.one_place", lambda: True)
    both = call(STORIES, tmp_path / "both", "--experts", 4)
    assert (head in both.stderr, head in both.stdout, found in both.stdout) == (True, False, True)
    quiet = call(STORIES, tmp_path / "quiet", "--experts", 4, "--quiet")
    assert head in quiet.stdout


def test_one_place_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with open(tmp_path / "a", "w") as one, open(tmp_path / "b", "w") as other:
        for out, err, expected in ((one, one, True), (one, other, False)):
            monkeypatch.setattr(sys, "stdout", out)
            monkeypatch.setattr(sys, "stderr", err)
            found = one_place()
            monkeypatch.undo()
            assert found is expected


def test_a_gate_that_the_loss_does_not_train_is_told(tmp_path: Path):
    plain = call(STORIES, tmp_path / "out", "--active", 1, "--dry-run").stdout
    assert "does not train the gate" in plain
    weighed = call(STORIES, tmp_path / "out", "--active", 1, "--dry-run", "-s", "normalize=false")
    assert "does not train the gate" not in weighed.stdout
    assert "does not train" not in call(STORIES, tmp_path / "out", "--dry-run").stdout
