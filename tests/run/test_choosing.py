"""Runs whose epochs differ in length: what is due when, resumed bit for bit, and their page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparing.core.clock import Clock
from sparing.run.compare.settled import _mean_signals
from sparing.run.plan import lines, plan
from sparing.run.progress import Quiet
from sparing.run.recipe import Recipe, Watch, load
from sparing.run.report import chosen, write
from sparing.run.report.read import read
from sparing.run.runner import run
from sparing.run.taken import Taken
from sparing.run.watching import Due

NAME = "vision-infobatch"


class Cut(Exception):
    """The process ends here."""


class Cutting(Quiet):
    """Ends the run when its display is told for the ``at``-th time."""

    def __init__(self, at: int) -> None:
        self.left = at

    def update(self, step: int, values: dict[str, str]) -> None:
        self.left -= 1
        if not self.left:
            raise Cut


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def small(*overrides: str) -> Recipe:
    return load(NAME, ["train.precision=fp32", "train.threads=1", *overrides], smoke=True)


def outcome(path: Path) -> dict[str, Any]:
    timed = {"seconds", "tokens_per_second", "code"}
    told = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((path / "summary.json").read_text())
    tensors = load_file(path / "model" / "model.safetensors")
    return {
        "metrics": [{k: v for k, v in line.items() if k not in timed} for line in told],
        "ledger": summary["ledger"],
        "methods": summary["methods"],
        "page": json.loads((path / "page.json").read_text()),
        "model": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("choosing") / "whole"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        run(small(), path)
    torch.set_num_threads(threads)
    return path


def test_samples_are_saved_and_the_account_says_so(whole):
    summary = json.loads((whole / "summary.json").read_text())
    lengths = summary["methods"]["infobatch"]["lengths"]
    assert summary["ledger"]["samples"] == {"spent": sum(lengths), "dense": 4 * 1800}
    assert summary["tokens"] == sum(lengths) < 0.9 * 4 * 1800
    flops = summary["ledger"]["flops"]
    assert flops["spent"] / flops["dense"] == pytest.approx(sum(lengths) / 7200, rel=1e-3)
    taken = json.loads((whole / "page.json").read_text())["taken"]
    assert set(taken["sizes"].values()) == {180}
    epochs = [sum(row[e] for row in taken["epochs"].values()) for e in range(4)]
    assert epochs == lengths


def test_evaluations_come_at_shares_of_what_is_really_done(whole):
    told = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line["tokens"] for line in told if line["kind"] == "eval"]
    lengths = json.loads((whole / "summary.json").read_text())["methods"]["infobatch"]["lengths"]
    assert evaluations == [sum(lengths[:2]), sum(lengths)]
    rates = [line["learning_rate"] for line in told if line["kind"] == "train"]
    assert rates[-1] < 0.02 < max(rates)  # the schedule ended although steps were left


@pytest.mark.parametrize("at", [7, 45, 93])
def test_cut_and_resumed_is_bit_identical(whole, tmp_path, at):
    steps = json.loads((whole / "summary.json").read_text())["steps"]
    with pytest.raises(Cut):
        run(small(), tmp_path / "run", display=Cutting(min(at, steps)))
    run(small(), tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_cut_after_the_last_step_evaluates_once(whole, tmp_path, monkeypatch):
    from sparing.tasks.vision import Vision

    with monkeypatch.context() as patch:
        patch.setattr(Vision, "page", lambda *_: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            run(small(), tmp_path / "run")
    run(small(), tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_the_plan_says_that_it_is_a_bound():
    planned = plan(small())
    assert planned["tokens"] == 4 * 1800
    assert planned["epochs"] == 4
    assert any("at most 7,200 samples in 116 steps" in line for line in lines(planned))
    full = plan(small("methods.infobatch=null"))
    assert not any("at most" in line for line in lines(full))


def test_due_by_steps_and_by_shares():
    watch = Watch(evaluate=0.25, checkpoint=0.5, log=0.1)
    clock = Clock(steps=40, epochs=4)
    due = Due(watch, clock)
    found = []
    for step in range(1, 41):
        clock.step = step
        found += [step] if due("evaluate", (step - 1) / 40) else []
    assert found == [10, 20, 30, 40]
    found, before = [], 0.0
    clock.step = 0
    for step in range(1, 31):  # ten steps an epoch were planned, three epochs have fewer
        lengths = (10, 7, 7, 6)
        epoch, left = 0, step
        while left > lengths[epoch]:
            left -= lengths[epoch]
            epoch += 1
        clock.step, clock.epoch, clock.place, clock.length = step, epoch, left, lengths[epoch]
        found += [step] if due("evaluate", before) else []
        before = clock.fraction
    assert found == [10, 17, 24, 30]


def test_taken_counts_and_goes_on():
    taken = Taken(("a", "b"), torch.tensor([3, 1]))
    taken.add(0, torch.tensor([0, 0, 1]))
    taken.add(2, torch.tensor([1]))
    taken.add(2, None)
    again = Taken(("a", "b"), torch.tensor([3, 1]))
    again.load_state_dict(json.loads(json.dumps(taken.state_dict())))
    assert (
        again.page()
        == taken.page()
        == {
            "sizes": {"a": 3, "b": 1},
            "epochs": {"a": [2, 0, 0], "b": [1, 0, 1]},
        }
    )


def test_a_random_arm_takes_the_mean_of_the_lengths():
    class Made:
        def __init__(self, lengths: list[int]) -> None:
            self.summary = {"methods": {"infobatch": {"lengths": lengths, "kept": 4, "who": "x"}}}

    found = _mean_signals([Made([10, 7, 6]), Made([10, 8, 7])])  # type: ignore[list-item]
    assert found == {"infobatch": {"lengths": [10, 8, 6], "kept": 4}}
    other = _mean_signals([Made([10, 7]), Made([10, 8, 7])])  # type: ignore[list-item]
    assert other == {"infobatch": {"kept": 4}}


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_shows_what_was_taken(whole):
    source = write(whole).read_text(encoding="utf-8")
    assert "img-src data:" in source
    assert "script-src" not in source
    images = re.findall(r'<img src="([^"]*)"', source)
    assert len(images) == 4 * 16
    assert all(re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", uri) for uri in images)
    for text in ("Which samples it took", "by class", "by difficulty", "The hardest", "ankle boot",
                 "Never left out", "samples/s", "By class", "5 neighbours"):  # fmt: skip
        assert text in source, text
    assert "tokens/s" not in source
    assert "No sample was generated" not in source
    assert "://" not in source


def test_hard_samples_are_kept_and_easy_ones_in_part(whole):
    view = chosen.chosen(read(whole))
    assert view is not None
    by_class, by_difficulty = view["tables"]
    assert [name for name, _ in by_difficulty["rows"]][::9] == ["easiest", "hardest"]
    easiest, hardest = by_difficulty["rows"][0][1], by_difficulty["rows"][-1][1]
    assert [cell[2] for cell in easiest] == [False, True, True, True]
    assert all(35 <= int(cell[1]) <= 65 for cell in easiest[1:])
    assert {cell[1] for cell in hardest[1:]} == {"100"}
    assert {cells[0][1] for _, cells in by_class["rows"]} == {"100"}
    assert max(bar["height"] for bar in view["histogram"]["bars"]) == 1


def test_a_page_asks_for_nothing_that_a_run_wrote_into_it(whole, tmp_path):
    copied = tmp_path / "run"
    copied.mkdir()
    for name in ("recipe.yaml", "metrics.jsonl", "summary.json"):
        (copied / name).write_bytes((whole / name).read_bytes())
    held = json.loads((whole / "page.json").read_text())
    first = held["selection"]["groups"][0]["index"][0]
    held["shown"][str(first)] = {"image": "https://else.where/x.png", "caption": "<b>"}
    held["pictures"] = [{"title": "<i>", "pictures": [{"image": "javascript:1", "text": ""}]}]
    held["selection"]["histogram"] = {"counts": [1], "edges": []}
    held["selection"]["by_difficulty"] = [[], [0.5] * 10]
    (copied / "page.json").write_text(json.dumps(held))
    source = write(copied).read_text(encoding="utf-8")
    assert "else.where" not in source
    assert "javascript" not in source
    assert "<i>" not in source.replace("<i style", "")


def test_many_epochs_are_thinned(whole):
    assert chosen._spread(4) == [0, 1, 2, 3]
    spread = chosen._spread(200)
    assert (len(spread), spread[0], spread[-1]) == (15, 0, 199)
    assert len(set(spread)) == 15


def test_a_page_without_choices_keeps_its_sections(tmp_path):
    run(small("methods.infobatch=null", "train.epochs=1", "train.batch_size=600"), tmp_path / "run")
    source = (tmp_path / "run" / "report.html").read_text()
    assert "Which samples it took" not in source
    assert "No method was attached" in source
    assert "On held-out data" in source
