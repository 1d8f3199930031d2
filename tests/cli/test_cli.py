from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import sparing
from sparing.cli import app
from sparing.core import registry
from sparing.run.recipe import available
from sparing.tasks.language import corpus

NAME = "language-dynmoe"
pytestmark = pytest.mark.usefixtures("quick_references")


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARING_SMOKE", "1")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def told(*arguments: str) -> Any:
    """What the command prints with --json, which is all that it prints to stdout."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def refused(*arguments: str, code: int = 2) -> str:
    """The one message of a command that ends with ``code``."""
    result = call(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# ---- run -----------------------------------------------------------------------------------------


def test_run_prints_the_summary_and_shows_progress_on_stderr(smoke_run):
    made = smoke_run(NAME)
    summary = json.loads(made.stdout)
    assert summary == json.loads((made.path / "summary.json").read_text())
    steps = summary["steps"]
    assert f"{NAME}: {steps} steps" in made.stderr
    assert f"step {steps}/{steps}  loss " in made.stderr
    assert "alive" in made.stderr
    assert "mean k" in made.stderr
    assert "left 0:00" in made.stderr
    assert "precision: fp32 " in made.stderr
    assert "\x1b" not in made.stderr  # no live bar where there is no terminal


FAST = (
    "-s", "train.tokens=2048", "-s", "train.precision=fp32", "-s", "task.domains=[gsm8k]",
)  # fmt: skip


def test_run_in_words_and_where_it_goes():
    torch.manual_seed(0)
    result = call("run", NAME, *FAST, "--quiet", "-s", "train.batch_size=4")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stderr == ""
    first, *rest = result.stdout.splitlines()
    assert first.startswith("bits_per_byte ")
    assert "after 2,048 tokens in " in first
    assert any(line.startswith("  compute: ") for line in rest)
    assert rest[-1] == f"page: runs/{NAME}/report.html"
    assert Path(f"runs/{NAME}/report.html").is_file()
    assert told("run", NAME, *FAST)["tokens"] == 2048
    assert Path(f"runs/{NAME}-2/summary.json").is_file()
    assert f"runs/{NAME}-2 holds a finished run" in refused("run", NAME, *FAST, "--resume")


def test_interrupted_and_resumed(monkeypatch):
    step = sparing.Session.step

    def interrupted(self: sparing.Session, *arguments: Any) -> float:
        if self.clock.step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    Path(f"runs/{NAME}").mkdir(parents=True)
    Path(f"runs/{NAME}/summary.json").write_text("{}")  # an earlier run that came to its end
    with monkeypatch.context() as patch:
        patch.setattr(sparing.Session, "step", interrupted)
        result = call("run", NAME, *FAST, "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "interrupted; go on with the same command and --resume" in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path(f"runs/{NAME}-2/summary.json").exists()
    assert told("run", NAME, *FAST, "--resume")["tokens"] == 2048
    assert Path(f"runs/{NAME}-2/summary.json").is_file()


def test_a_failed_run_ends_with_1(monkeypatch):
    from sparing.tasks.language import Language

    losses = Language.losses

    def spoiled(self: Language, model: Any, batch: Any) -> Any:
        found, outputs = losses(self, model, batch)
        return found * (torch.nan if Path("spoil").exists() else 1.0), outputs

    monkeypatch.setattr(Language, "losses", spoiled)
    begin = sparing.Session.__iter__

    def late(self: sparing.Session) -> Any:
        Path("spoil").touch()
        return begin(self)

    monkeypatch.setattr(sparing.Session, "__iter__", late)
    message = refused("run", NAME, *FAST, "--out", "here", code=1)
    assert "the loss is not finite at step 1 " in message
    assert "of gsm8k" in message
    assert "No checkpoint had been written yet" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods.dynmoe.max_experts=0", "max_experts must be at least 1, got 0"),
        ("task.vocab=300", "vocab 300 does not fit: tokens are bytes, set vocab to 256"),
        ("task.seq_len=99000000", "seq_len 99000000 does not fit: domain "),
        ("task.domains=[]", "domains is empty; name at least one of "),
        ("task.domains=[pyton]", 'unknown domain "pyton"; did you mean "python"?'),
        ("methods.dynmo={}", 'unknown method "dynmo"; did you mean "dynmoe"?'),
        ("task.name=languages", 'unknown task "languages"; did you mean "language"?'),
        ("train.steps=9", 'unknown key in recipe.train "steps"'),
        ("methods.dynmoe.where=model.layer.0.mlp", 'did you mean "model.layers.0.mlp"?'),
        ("train.tokens=10", "train.tokens is 10, less than one step of "),
        ("train", 'an override is key=value, got "train"'),
    ],
)
def test_wrong_requests_end_with_2_and_leave_nothing(override, message):
    assert message in refused("run", NAME, "-s", override)
    assert message in refused("plan", NAME, "-s", override)
    assert list(Path().iterdir()) == []


def test_wrong_names_and_directories(monkeypatch):
    assert 'unknown recipe "language-dynmo"; did you mean "language-dynmoe"?' in refused(
        "run", "language-dynmo"
    )
    assert "there is no recipe file mine.yaml" in refused("plan", "mine.yaml")
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").touch()
    assert "thesis is not empty and holds no run" in refused("run", NAME, "--out", "thesis")
    assert "there is no run to resume in nowhere" in refused(
        "run", NAME, "--out", "nowhere", "--resume"
    )
    monkeypatch.setitem(
        corpus.DOMAINS, "gsm8k", lambda: corpus.Split(train=b"x" * 9999, held_out=b"")
    )
    assert 'domain "gsm8k" has no held-out text: it is empty' in refused("run", NAME, *FAST)


# ---- plan ----------------------------------------------------------------------------------------


def test_plan_spends_and_writes_nothing(smoke_run):
    made = json.loads(smoke_run(NAME).stdout)
    found = told("plan", NAME)
    assert list(Path().iterdir()) == []
    assert found["recipe"] == NAME
    assert (found["steps"], found["tokens"]) == (made["steps"], made["tokens"])
    assert found["corpus"] == made["corpus"]
    assert set(found["methods"]) == {"dynmoe"}
    # the cost that it foretells is near the one that was paid
    for side in ("spent", "dense"):
        assert found["flops"][side] == pytest.approx(made["ledger"]["flops"][side], rel=0.5)

    words = call("plan", NAME)
    assert words.exit_code == 0
    assert words.stderr == ""
    lines = words.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["data", "budget", "model"]
    assert "model.layers.0.mlp: feed-forward block becomes " in words.stdout
    assert lines[-2].startswith("compute     about ")
    assert lines[-1].startswith("time        about ")
    assert list(Path().iterdir()) == []


def test_plan_of_epochs_and_of_no_method():
    found = told(
        "plan", NAME, "-s", "methods=null", "-s", "train.epochs=1", "-s", "train.tokens=null"
    )
    assert found["methods"] == {}
    assert found["epochs"] == pytest.approx(1.0, abs=0.01)
    assert found["flops"]["spent"] == found["flops"]["dense"] > 0


# ---- report --------------------------------------------------------------------------------------


def test_report_writes_the_page_of_one_run_and_of_several(smoke_run, tmp_path):
    path = smoke_run(NAME).path
    (path / "report.html").unlink()
    assert told("report", str(path)) == {"page": str(path / "report.html")}
    assert "<html" in (path / "report.html").read_text()
    words = call("report", str(path))
    assert (words.exit_code, words.stdout) == (0, f"{path / 'report.html'}\n")

    result = call("run", NAME, *FAST, "--quiet", "--out", "second")
    assert result.exit_code == 0
    page = Path(told("report", str(path), "second")["page"])
    text = page.read_text()
    assert "second" in text
    assert path.name in text


def test_report_of_what_is_no_run():
    message = refused("report", "nowhere")
    assert "nowhere" in message


# ---- ls, card ------------------------------------------------------------------------------------


def test_ls_names_everything():
    found = told("ls")
    assert [entry["name"] for entry in found["recipes"]] == sorted(available())
    assert [entry["name"] for entry in found["methods"]] == [r.name for r in registry.methods()]
    assert [entry["name"] for entry in found["tasks"]] == [r.name for r in registry.tasks()]
    assert all(entry["about"] for entries in found.values() for entry in entries)
    words = call("ls")
    assert (words.exit_code, words.stderr) == (0, "")
    for entries in found.values():
        for entry in entries:
            assert f"  {entry['name']} " in words.stdout
            assert entry["about"] in words.stdout


@pytest.mark.parametrize("name", [record.name for record in registry.methods()])
def test_card(name):
    record = registry.method_record(name)
    found = told("card", name)
    assert (found["name"], found["class"], found["paper"]) == (
        name, record.class_name, record.paper,
    )  # fmt: skip
    words = call("card", record.class_name)
    assert words.exit_code == 0
    assert words.stdout.rstrip("\n") == found["card"].rstrip("\n")
    assert found["card"].startswith("# ")


def test_card_of_an_unknown_method():
    assert 'unknown method "dinmoe"; did you mean "dynmoe"?' in refused("card", "dinmoe")


# ---- the program itself --------------------------------------------------------------------------


def test_help_and_unknown_commands():
    for arguments in ([], ["--help"], ["run", "--help"]):
        result = call(*arguments)
        assert result.exit_code == (0 if arguments else 2)
        assert "Usage" in result.output
    for arguments in (["frob"], ["run"], ["run", NAME, "--frob"]):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_as_a_process_exit_codes_and_streams_are_the_same():
    source = str(Path(sparing.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}

    def started(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sparing.cli", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )

    fine, wrong = started("ls", "--json"), started("card", "dinmoe")
    assert (fine.returncode, fine.stderr) == (0, "")
    assert set(json.loads(fine.stdout)) == {"recipes", "methods", "tasks"}
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith('error: unknown method "dinmoe"')
    assert wrong.stderr.count("\n") == 1
