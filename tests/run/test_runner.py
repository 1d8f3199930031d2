from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import STEPS, tiny

import sparing
from sparing.core import state
from sparing.core.errors import RequestError, RunError
from sparing.core.random_state import random_state
from sparing.run import progress, runner
from sparing.run.directory import RunDirectory, free_path, unfinished_path
from sparing.run.progress import LiveBar, PlainLines, Quiet
from sparing.run.recipe import Recipe, available, resolve
from sparing.run.runner import run
from sparing.tasks.language import Language, corpus

FILES = {
    "recipe.yaml",
    "metrics.jsonl",
    "summary.json",
    "page.json",
    "report.html",
    "documents.safetensors",
    "checkpoint",
    "model",
}
pytestmark = pytest.mark.usefixtures("quick_references")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Recipes may set the number of threads of the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]


def timeless(value: Any) -> Any:
    """Without what depends on the clock on the wall, or on an edit of the sources meanwhile."""
    if isinstance(value, dict):
        left_out = {"seconds", "tokens_per_second", "probe_seconds", "code"}
        return {key: timeless(item) for key, item in value.items() if key not in left_out}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def digests(checkpoint: Path) -> dict[str, str]:
    tensors = load_file(checkpoint / "tensors.safetensors")
    return {
        name: f"{t.dtype} {tuple(t.shape)} {hashlib.sha256(t.numpy().tobytes()).hexdigest()[:8]}"
        for name, t in tensors.items()
    }


def outcome(path: Path) -> dict[str, Any]:
    """All that must come out the same, bit for bit."""
    checkpoint = next((path / "checkpoint").iterdir())
    summary = timeless(json.loads((path / "summary.json").read_text()))
    return {
        "files": {entry.name for entry in path.iterdir()},
        "metrics": timeless(lines(path)),
        **{f"summary/{key}": value for key, value in summary.items()},
        "page": json.loads((path / "page.json").read_text()),
        "recipe": (path / "recipe.yaml").read_text(),
        "model": (path / "model" / "model.safetensors").read_bytes(),
        "checkpoint": checkpoint.name,
        **{f"state/{name}": digest for name, digest in digests(checkpoint).items()},
    }


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        from conftest import stand_in_references
        from sparing.tasks.language import reference

        patch.setattr(reference, "references", stand_in_references)
        path = tmp_path_factory.mktemp("unkilled") / "run"
        run(tiny(), path)
    return path


class Cut(BaseException):
    """An end that nothing catches, like a kill, without the cost of a process."""


class Cutting(Quiet):
    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, step: int, values: dict[str, str]) -> None:
        if step == self.step:
            raise Cut


def cut(path: Path, step: int, recipe: Recipe | None = None) -> Path:
    """A run that ended in the middle of a step."""
    with pytest.raises(Cut):
        run(recipe or tiny(), path, display=Cutting(step))
    return path


# ---- a whole run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(available()))
def test_every_recipe_runs_in_its_smoke_form(name, smoke_run):
    path = smoke_run(name).path
    assert {entry.name for entry in path.iterdir()} == FILES
    summary = json.loads((path / "summary.json").read_text())
    assert set(summary) >= {
        "format", "recipe", "task", "seed", "metric", "methods", "ledger", "steps", "seconds",
        "environment", "code", "corpus",
    }  # fmt: skip
    assert summary["format"] == 1
    assert summary["recipe"] == name
    assert set(summary["metric"]) == {"name", "value", "higher_is_better"}
    assert math.isfinite(summary["metric"]["value"])
    documents = load_file(path / "documents.safetensors")
    means = [float(each.mean()) for each in documents.values()]
    assert sum(means) / len(means) == pytest.approx(summary["metric"]["value"], abs=1e-9)
    assert set(summary["environment"]) >= {"python", "torch", "device", "threads"}
    assert re.fullmatch("[0-9a-f]{64}", summary["code"])
    assert re.fullmatch("[0-9a-f]{64}", summary["corpus"])
    for unit in ("samples", "tokens", "flops", "parameters"):
        assert summary["ledger"][unit]["spent"] > 0
    assert summary["ledger"]["tokens"]["spent"] == summary["tokens"]

    told = lines(path)
    train = [line for line in told if line["kind"] == "train"]
    assert [line["step"] for line in train][-1] == summary["steps"]
    assert set(train[0]) >= {
        "step", "epoch", "samples", "tokens", "flops", "loss", "tokens_per_second", "signals",
    }  # fmt: skip
    assert all(a["tokens"] < b["tokens"] for a, b in itertools.pairwise(train))
    assert train[-1]["flops"] == summary["ledger"]["flops"]["spent"]
    evaluated = [line for line in told if line["kind"] == "eval"]
    assert evaluated[-1]["step"] == summary["steps"]
    assert evaluated[-1][summary["metric"]["name"]] == summary["metric"]["value"]
    assert "<html" in (path / "report.html").read_text()

    resolved = RunDirectory(path).recipe()
    assert resolved is not None
    assert resolved.to_dict() == resolve(resolved.to_dict()).to_dict()


def test_the_model_of_a_run_can_be_loaded_and_the_loss_fell(unkilled):
    model = sparing.load(unkilled / "model").eval()
    task = tiny().build_task()
    task.prepare(0)
    summary = json.loads((unkilled / "summary.json").read_text())
    with torch.no_grad():
        assert task.evaluate(model) == summary["metrics"]
    losses = [line["loss"] for line in lines(unkilled) if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    assert summary["steps"] == STEPS
    assert summary["methods"]["dynmoe"]["updates"] > 2


def test_a_model_without_experts_is_left_as_transformers_reads_it(tmp_path):
    from transformers import AutoModelForCausalLM

    without = tiny("methods={}")
    run(without, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense" / "model")
    task = without.build_task()
    task.prepare(0)
    summary = json.loads((tmp_path / "dense" / "summary.json").read_text())
    assert task.evaluate(model) == summary["metrics"]


def test_a_run_depends_on_its_seed_and_on_nothing_else_drawn(unkilled, tmp_path, monkeypatch):
    drawn: list[float] = []
    losses = Language.losses

    def drawing(self: Language, model: Any, batch: Any) -> Any:
        drawn.append(float(torch.rand(())) + random.random() + np.random.rand())  # noqa: NPY002
        return losses(self, model, batch)

    monkeypatch.setattr(Language, "losses", drawing)
    first: list[float] = []
    for seed in (0, 0, 1):
        torch.rand(3)
        before = random_state()
        drawn.clear()
        run(tiny("train.tokens=512", f"seed={seed}"), tmp_path / f"{len(first)}")
        first.append(drawn[-1])
        after = random_state()
        assert after["torch"].equal(before["torch"])
        assert after["python"] == before["python"]
        assert after["numpy"][1].equal(before["numpy"][1])
    assert first[0] == first[1] != first[2]


def test_the_lines_of_a_run_come_when_the_recipe_says(unkilled):
    steps: dict[str, list[int]] = {}
    for line in lines(unkilled):
        steps.setdefault(line["kind"], []).append(line["step"])
    assert steps["train"] == [*range(3, STEPS + 1, 3)]
    assert steps["eval"] == [6, 12, 18, 24]
    (checkpoint,) = (unkilled / "checkpoint").iterdir()
    assert checkpoint.name == f"step-{STEPS:08d}"


# ---- killed and resumed --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """Runs that a SIGKILL ended: their directories, and the step or the saving at which."""
    ends = {"step": random.SystemRandom().randrange(1, STEPS + 1), "save": 3}
    made = {how: (tmp_path_factory.mktemp("killed") / how, at) for how, at in ends.items()}
    arguments = [str(part) for how, (path, at) in made.items() for part in (path, how, at)]
    script = Path(__file__).with_name("killed_run.py")
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.splitlines() == [f"{path} {-signal.SIGKILL}" for path, _ in made.values()], (
        done.stderr
    )
    return made


def test_killed_at_a_random_step_and_resumed_is_bit_identical(unkilled, killed):
    path, step = killed["step"]
    assert not (path / "summary.json").exists()
    run(tiny(), path, resume=True)
    assert outcome(path) == outcome(unkilled), f"killed at step {step}"


def test_killed_while_saving_and_resumed_is_bit_identical(unkilled, killed):
    path, _ = killed["save"]
    assert {entry.name for entry in (path / "checkpoint").iterdir()} == {
        "step-00000010", ".step-00000015.writing",
    }  # fmt: skip
    run(tiny(), path, resume=True)
    assert outcome(path) == outcome(unkilled)


@pytest.mark.parametrize("steps", [(2,), (5, 6), (13, 11, 23)])
def test_cut_several_times_is_bit_identical(unkilled, tmp_path, steps):
    path = cut(tmp_path / "run", steps[0])
    for step in steps[1:]:
        # a kill may also leave half a line
        with (path / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "st')
        with pytest.raises(Cut):
            run(tiny(), path, resume=True, display=Cutting(step))
    run(tiny(), path, resume=True)
    assert outcome(path) == outcome(unkilled)


def test_cut_after_training_while_the_rest_is_written(unkilled, tmp_path, monkeypatch):
    path = tmp_path / "run"
    page = Language.page
    monkeypatch.setattr(Language, "page", lambda *_: (_ for _ in ()).throw(Cut))
    with pytest.raises(Cut):
        run(tiny(), path)
    monkeypatch.setattr(Language, "page", page)
    run(tiny(), path, resume=True)
    found, expected = outcome(path), outcome(unkilled)
    evaluations = [line for line in found["metrics"] if line["kind"] == "eval"]
    assert evaluations == [line for line in expected["metrics"] if line["kind"] == "eval"]
    assert found == expected


# ---- failures while it runs ----------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The ``at``-th training batch from now on has a loss that is no number."""
    losses = Language.losses
    seen = 0

    def spoiled(self: Language, model: Any, batch: Any) -> Any:
        nonlocal seen
        found, outputs = losses(self, model, batch)
        if model.training and found.requires_grad:
            seen += 1
            if seen == at:
                found = found * torch.nan
        return found, outputs

    monkeypatch.setattr(Language, "losses", spoiled)


def test_a_loss_that_is_no_number_stops_with_step_domain_and_checkpoint(
    unkilled, tmp_path, monkeypatch
):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, at=1 + 2 * 12 + 1)  # after the dry run; two micro-batches a step
        with pytest.raises(RunError) as caught:
            run(tiny(), path)
    message = str(caught.value)
    assert "the loss is not finite at step 13" in message
    assert "of shakespeare" in message
    assert "The last good checkpoint is kept: " in message
    assert message.endswith("step-00000010")
    run(tiny(), path, resume=True)
    assert outcome(path) == outcome(unkilled)


def test_a_loss_that_is_no_number_before_any_checkpoint(tmp_path, monkeypatch):
    spoil(monkeypatch, at=1 + 2)
    with pytest.raises(RunError, match=r"at step 1 .*No checkpoint had been written yet"):
        run(tiny(), tmp_path / "run")


@pytest.mark.parametrize("call", ["save_file", "_write"])
def test_a_full_disk_keeps_the_previous_checkpoint(unkilled, tmp_path, monkeypatch, call):
    path = tmp_path / "run"
    genuine = getattr(state, call)

    def full(first: Any, second: Any) -> None:
        target = second if call == "save_file" else first
        if "step-00000015" in str(target):
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(first, second)

    with monkeypatch.context() as patch:
        patch.setattr(state, call, full)
        with pytest.raises(RunError, match="No space left on device") as caught:
            run(tiny(), path)
    assert "what was there before is kept" in str(caught.value)
    assert str(path / "checkpoint" / "step-00000010") in str(caught.value)
    assert RunDirectory(path).checkpoints.newest()[0] == 10
    run(tiny(), path, resume=True)
    assert outcome(path) == outcome(unkilled)


def test_a_run_is_whole_without_its_page(tmp_path, monkeypatch):
    from sparing.run import report

    def fail(*_: Any) -> None:
        raise RunError("no paper left")

    monkeypatch.setattr(report, "write", fail)
    told = Told()
    run(tiny("train.tokens=512"), tmp_path / "run", display=told)
    assert "no page was written: no paper left" in told.notes
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == FILES - {"report.html"}


class Told(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# ---- requests that are wrong ---------------------------------------------------------------------


def test_what_cannot_be_resumed(unkilled, tmp_path):
    def refused(message: str, path: Path, *overrides: str, resume: bool = True) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(RequestError, match=message):
            run(tiny(*overrides), path, resume=resume)
        assert sorted(tmp_path.rglob("*")) == before

    refused("there is no run to resume in", tmp_path / "nowhere")
    refused("holds a finished run; look at it with: sparing report", unkilled)
    refused("holds a finished run", unkilled, resume=False)

    half = cut(tmp_path / "half", 7)
    refused("holds an unfinished run of this recipe; go on with it by --resume", half, resume=False)
    refused(r"holds another recipe: seed is 0 there and 3 here", half, "seed=3")
    refused("methods.dynmoe.target_k is", half, "methods.dynmoe.target_k=2.5", resume=False)
    refused("train.precision is 'fp32' there and 'bf16' here", half, "train.precision=bf16")

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    refused("is not empty and holds no run", foreign, resume=False)
    refused("is not empty and holds no run", foreign)
    refused("is not a directory", foreign / "thesis.tex", resume=False)
    (foreign / "recipe.yaml").write_text("train: [")
    refused("recipe.yaml is not a recipe of this version", foreign)


def test_a_run_on_other_data_is_not_resumed(tmp_path, monkeypatch):
    path = cut(tmp_path / "run", 7)
    monkeypatch.setattr(corpus, "fingerprint", lambda texts: "f" * 64)
    with pytest.raises(RequestError, match=r"was trained on other data .* here it is ffffffffffff"):
        run(tiny(), path, resume=True)


def test_a_checkpoint_of_another_recipe_is_not_taken(tmp_path):
    path, other = cut(tmp_path / "run", 7), cut(tmp_path / "other", 7, tiny("seed=1"))
    (path / "checkpoint").rename(tmp_path / "away")
    (other / "checkpoint").rename(path / "checkpoint")
    with pytest.raises(RequestError, match="is of another recipe: seed is 1 there and 0 here"):
        run(tiny(), path, resume=True)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_checkpoint_that_was_cut_short_is_an_error(tmp_path, name):
    path = cut(tmp_path / "run", 7)
    file = path / "checkpoint" / "step-00000005" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = (path / "metrics.jsonl").read_text()
    with pytest.raises(RunError, match=r"is damaged or cut short \(.*delete this directory to"):
        run(tiny(), path, resume=True)
    assert (path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.seq_len=2000000", r'seq_len 2000000 does not fit: domain "shakespeare"'),
        ("train.tokens=100", "train.tokens is 100, less than one step of 256 tokens"),
        ('methods.dynmoe.where=["model.layers.7.mlp"]', r'unknown layer "model.layers.7.mlp"; did'),
    ],
)
def test_a_request_that_turns_out_wrong_leaves_nothing_behind(tmp_path, override, message):
    with pytest.raises(RequestError, match=message):
        run(tiny(override), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_domain(tmp_path, monkeypatch):
    monkeypatch.setitem(
        corpus.DOMAINS, "shakespeare", lambda: corpus.Split(train=b"", held_out=b"x" * 99)
    )
    with pytest.raises(RequestError, match=r'"shakespeare" has no training text: it is empty'):
        run(tiny(), tmp_path / "run")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    find = runner.importlib.util.find_spec
    monkeypatch.setattr(
        runner.importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name)
    )
    with pytest.raises(RequestError, match=r'needs jinja2.*pip install "sparing\[report\]"'):
        run(tiny(), tmp_path / "run")


# ---- precision -----------------------------------------------------------------------------------


def test_measured_precision_is_recorded_and_kept_on_resume(tmp_path, monkeypatch):
    recipe = tiny("train.precision=auto", "train.tokens=2048")
    measured = {"fp32": 2.0, "bf16": 1.0}
    monkeypatch.setattr(runner, "probe", lambda *_: measured)
    path = cut(tmp_path / "run", 5, recipe)
    assert RunDirectory(path).recipe().train.precision == "bf16"

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(runner, "probe", never)
    summary = run(recipe, path, resume=True)
    assert summary["precision"] == {"chosen": "bf16", "probe_seconds": measured}
    assert RunDirectory(path).recipe().train.precision == "bf16"


def test_the_probe_measures_both_and_leaves_the_model_alone():
    from sparing.run.precision import probe

    model = torch.nn.Linear(4, 1)
    before = [p.detach().clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    seen = []

    def losses(copied: Callable[..., Any], batch: Any) -> Any:
        outputs = torch.nn.functional.dropout(copied(batch))
        seen.append(outputs.dtype)
        return outputs[:, 0].float(), outputs

    found = probe(model, losses, torch.ones(3, 4), torch.device("cpu"))
    assert set(found) == {"fp32", "bf16"}
    assert all(0 < seconds < 60 for seconds in found.values())
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert all(p.grad is None for p in model.parameters())
    assert all(p.equal(old) for p, old in zip(model.parameters(), before, strict=True))
    assert torch.get_rng_state().equal(random_state)


# ---- where runs go, and what they show -----------------------------------------------------------


def test_paths_of_runs(tmp_path):
    base = tmp_path / "run"
    assert free_path(base) == base
    assert unfinished_path(base) == base
    for name, finished in (("run", True), ("run-2", False), ("run-3", True)):
        (tmp_path / name).mkdir()
        if finished:
            (tmp_path / name / "summary.json").write_text("{}")
    assert free_path(base) == tmp_path / "run-4"
    assert unfinished_path(base) == tmp_path / "run-2"
    (tmp_path / "run-2" / "summary.json").write_text("{}")
    assert unfinished_path(base) == tmp_path / "run-3"


def test_plain_lines_come_every_few_seconds_and_at_the_end(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    shown = PlainLines(stream)
    shown.start("a run", 100, 40)
    for step in range(41, 101):
        now += 0.5
        shown.update(step, {"loss": f"{step}", "alive": "3 4"})
    shown.note("done")
    shown.stop()
    told = stream.getvalue().splitlines()
    assert told[0] == "a run: 100 steps, going on after step 40"
    assert told[2] == "step 61/100  loss 61  alive 3 4  left 0:20"
    assert [line.split()[1] for line in told[1:-1]] == ["41/100", "61/100", "81/100", "100/100"]
    assert told[-1] == "done"


def test_the_live_bar_shows_numbers_and_notes():
    stream = io.StringIO()
    shown = LiveBar(Console(file=stream, force_terminal=True, width=100, no_color=True))
    shown.start("a run", 10, 2)
    shown.update(7, {"loss": "1.234"})
    shown.note("[expert] added")  # brackets are text, not markup
    shown.stop()
    text = stream.getvalue()
    assert "7/10 steps" in text
    assert "1.234" in text
    assert "[expert] added" in text


def test_a_display_fits_where_stderr_goes(monkeypatch):
    assert isinstance(progress.display(), PlainLines)
    assert isinstance(progress.display(quiet=True), Quiet)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(progress.display(), LiveBar)
    signals = {"dynmoe": {"alive": [3, 4], "mean_k": 1.234, "updates": 2}}
    found = progress.signal_values(signals)
    assert found == {"alive": "3 4", "mean k": "1.23", "updates": "2"}
