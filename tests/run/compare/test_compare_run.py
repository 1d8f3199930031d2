"""Running what a comparison lacks: order, resume, budget, looks, matched and tuned arms."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from launches import Cut, ForShow, InProcess, read

import sparing
from sparing.core.errors import RequestError, RunError
from sparing.run.compare import run as engine
from sparing.run.compare import settled, work
from sparing.run.compare.arms import Asked
from sparing.run.compare.run import run_comparison

RECIPE = {
    "about": "arms for tests",
    "task": {"name": "language", "seq_len": 32, "dim": 16, "heads": 2, "layers": 1, "width": 24,
             "domains": ["shakespeare"], "eval_windows": 4, "sample_bytes": 8, "passage_bytes": 16},
    "train": {"tokens": 2048, "batch_size": 4, "precision": "fp32", "learning_rate": 0.003},
    "compare": {"baseline": "plain", "margin": "+-0.02 bits_per_byte"},
    "arms": {
        "plain": {},
        "wide": {"set": {"task.width": 32}},
        "top-k": {"set": {"methods": {"top-k": {"experts": 4, "width": 8}}}},
    },
}  # fmt: skip
WIDTH = {24: 2.0, 32: 1.9}


@pytest.fixture
def recipe(tmp_path):
    def write(**changes: Any) -> str:
        body = RECIPE | changes
        path = tmp_path / "recipe.yaml"
        kept = {key: value for key, value in body.items() if value is not None}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return str(path)

    return write


def by_width(recipe) -> float:
    wobble = {0: 0.0, 1: 0.004, 2: -0.003}.get(recipe.seed, 0.001 * recipe.seed)
    return WIDTH.get(recipe.task["width"], 2.0) + wobble * (1 + 0.1 * bool(recipe.methods))


def asked(recipe: str, tmp_path: Path, **options: Any) -> Asked:
    options.setdefault("arms", ["plain", "wide"])
    options.setdefault("seeds", 2)
    return Asked(recipe=recipe, out=tmp_path / "out", **options)


# ---- order, resume -------------------------------------------------------------------------------


def test_seeds_run_block_by_block_and_nothing_runs_twice(recipe, tmp_path):
    launch = ForShow(by_width)
    what = asked(recipe(), tmp_path, command="sparing compare ...")
    found = run_comparison(what, launch=launch)
    assert launch.names == ["plain, seed 0", "wide, seed 0", "plain, seed 1", "wide, seed 1"]
    assert found.arm("wide").judgement.verdict == "different"
    assert (tmp_path / "out" / "compare.html").is_file()
    again = ForShow(by_width)
    assert run_comparison(what, launch=again).to_dict() == found.to_dict()
    assert again.names == []
    more = ForShow(by_width)
    run_comparison(asked(recipe(), tmp_path, seeds=3, arms=["plain", "wide", "top-k"]), launch=more)
    assert more.names == [
        "top-k, seed 0", "top-k, seed 1", "plain, seed 2", "wide, seed 2", "top-k, seed 2",
    ]  # fmt: skip


@pytest.mark.parametrize("cut_at", range(4))
def test_a_cut_comparison_goes_on_where_it_was(recipe, tmp_path, cut_at):
    launch = ForShow(by_width, cut_at=cut_at)
    with pytest.raises(Cut):
        run_comparison(asked(recipe(), tmp_path), launch=launch)
    assert launch.stopped
    rest = ForShow(by_width)
    found = run_comparison(asked(recipe(), tmp_path), launch=rest)
    assert len(launch.names) + len(rest.names) == 4
    assert found.missing == []


def test_several_at_a_time_are_the_same_comparison(recipe, tmp_path):
    one = run_comparison(asked(recipe(), tmp_path / "1"), launch=ForShow(by_width))
    two = run_comparison(asked(recipe(), tmp_path / "2", jobs=3), launch=ForShow(by_width))
    assert [arm.values for arm in one.arms] == [arm.values for arm in two.arms]


def test_python_reads_the_directory_back(recipe, tmp_path):
    made = run_comparison(asked(recipe(), tmp_path), launch=ForShow(by_width))
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    found = sparing.compare(moved)
    for name in ("plain", "wide"):
        assert found.arm(name).values == made.arm(name).values
        assert found.arm(name).declared == made.arm(name).declared
    assert found.arm("wide").judgement == made.arm("wide").judgement
    assert sparing.compare(moved, margin="+-1 bits_per_byte").arm("wide").judgement.verdict == (
        "equivalent"
    )


def test_a_diverged_run_is_kept_and_not_run_again(recipe, tmp_path):
    def metric(recipe):
        return None if (recipe.task["width"], recipe.seed) == (32, 1) else by_width(recipe)

    found = run_comparison(asked(recipe(), tmp_path, seeds=3), launch=ForShow(metric))
    assert found.missing == ["wide, seed 1: diverged, the loss is not finite"]
    assert found.arm("wide").judgement.n == 2
    assert "failed" not in found.about
    again = ForShow(metric)
    run_comparison(asked(recipe(), tmp_path, seeds=3), launch=again)
    assert again.names == []


def test_a_failed_run_is_told_and_tried_again(recipe, tmp_path):
    class Failing(ForShow):
        def __call__(self, job):
            return "the disk is full" if job.name == "wide, seed 0" else super().__call__(job)

    found = run_comparison(asked(recipe(), tmp_path), launch=Failing(by_width))
    assert found.missing == ["wide, seed 0: missing, the disk is full"]
    assert found.about["failed"] == [f"{tmp_path / 'out' / 'wide' / 'seed-0'}: the disk is full"]
    assert sparing.compare(tmp_path / "out").missing == found.missing
    again = ForShow(by_width)
    run_comparison(asked(recipe(), tmp_path), launch=again)
    assert again.names == ["wide, seed 0"]


def test_nothing_finished_is_a_failure(recipe, tmp_path):
    with pytest.raises(RunError, match=r"no run is finished.*the loss is not finite"):
        run_comparison(asked(recipe(), tmp_path), launch=ForShow(lambda recipe: None))


def test_what_a_kill_left_half_written_does_not_stand_in_the_way(recipe, tmp_path):
    run_comparison(asked(recipe(), tmp_path, seeds=1), launch=ForShow(by_width))
    place = tmp_path / "out" / "plain" / "seed-1"
    place.mkdir(parents=True)
    (place / ".recipe.yaml.writing").write_text("nam")
    assert work.clear(place) is False
    assert list(place.iterdir()) == []
    (tmp_path / "out" / ".comparison.json.writing").write_text("{")
    run_comparison(asked(recipe(), tmp_path), launch=ForShow(by_width))


# ---- budget, looks -------------------------------------------------------------------------------


class Clock:
    """Time that passes while runs are made for show: a minute each."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(work.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(engine, "estimated_seconds", lambda recipe: {"total": 60.0})

    def metric(self, recipe):
        self.now += 60.0
        return by_width(recipe)


def test_the_budget_begins_no_block_that_it_cannot_end(recipe, tmp_path, monkeypatch):
    clock, said = Clock(monkeypatch), []
    launch = ForShow(clock.metric)
    found = run_comparison(
        asked(recipe(), tmp_path, seeds=3, budget=3.5), launch=launch, note=said.append
    )
    assert launch.names == ["plain, seed 0", "wide, seed 0"]
    assert "the budget is used up: 4 runs not started" in said
    assert "a run of plain takes about 1.0 minutes" in said
    assert found.missing[0] == "plain, seed 1: missing, the budget did not reach it"
    assert len(found.missing) == 4
    clock.now = 0.0
    rest = ForShow(clock.metric)
    found = run_comparison(asked(recipe(), tmp_path, seeds=3, budget=10), launch=rest)
    assert len(rest.names) == 4
    assert found.missing == []


def test_a_budget_for_a_part_of_the_first_block_makes_that_part(recipe, tmp_path, monkeypatch):
    launch = ForShow(Clock(monkeypatch).metric)
    run_comparison(asked(recipe(), tmp_path, budget=1.5), launch=launch)
    assert launch.names == ["plain, seed 0"]


def test_a_comparison_ends_at_the_look_that_decides(recipe, tmp_path):
    said: list[str] = []
    launch = ForShow(by_width)
    found = run_comparison(
        asked(recipe(), tmp_path, seeds=6, looks=2), launch=launch, note=said.append
    )
    assert launch.names[-1] == "wide, seed 2"
    assert "every verdict is decided after look 1 of 2" in said
    assert found.arm("wide").judgement.alpha == pytest.approx(0.025)
    assert found.arm("wide").judgement.n == 3
    again = sparing.compare(tmp_path / "out")  # the planned looks and the level are the directory's
    assert (again.looks, again.arm("wide").judgement.alpha) == (2, pytest.approx(0.025))
    assert sparing.compare(tmp_path / "out", looks=1).arm("wide").judgement.alpha == 0.05


def test_an_undecided_look_goes_on(recipe, tmp_path):
    launch = ForShow(
        lambda recipe: by_width(recipe) + 0.1 * (recipe.seed * recipe.task["width"] % 7)
    )
    found = run_comparison(asked(recipe(), tmp_path, seeds=4, looks=2), launch=launch)
    assert len(launch.names) == 8
    assert found.arm("wide").judgement.verdict == "undecided"


# ---- arms that wait for others -------------------------------------------------------------------

MATCHED = RECIPE["arms"] | {"fitted": {"match": {"key": "task.width", "to": "wide"}}}  # type: ignore[operator]


@pytest.fixture
def planned(monkeypatch):
    """A stand-in for plan: FLOPs are linear in the width, or in k."""
    calls: list[int] = []

    def plan(recipe):
        calls.append(1)
        options = recipe.methods.get("top-k")
        size = 200 * options["k"] if options else 20 * recipe.task["width"]
        return {"flops": {"spent": 200 + size, "dense": 0}, "parameters": size}

    monkeypatch.setattr(settled, "plan", plan)
    return calls


def test_a_matched_arm_costs_what_the_other_spent(recipe, tmp_path, planned):
    launch = ForShow(by_width)
    what = asked(recipe(arms=MATCHED), tmp_path, arms=["plain", "fitted", "wide"])
    found = run_comparison(what, launch=launch)
    # the other arm's runs come first, since their mean decides
    assert launch.names == [
        "wide, seed 0", "wide, seed 1", "plain, seed 0", "fitted, seed 0",
        "plain, seed 1", "fitted, seed 1",
    ]  # fmt: skip
    assert {yaml.safe_load((job.out / "recipe.yaml").read_text())["task"]["width"]
            for job in launch.jobs if job.name.startswith("fitted")} == {40}  # fmt: skip
    declared = found.arm("fitted").declared
    assert declared["settled"] == {"task.width": 40}
    assert declared["match"]["target"] == 1000.5
    assert declared["match"]["planned"] == 1000
    assert declared["command"].endswith(
        f"-s task.width=40 -s train.precision=fp32 -s seed=N --out {tmp_path / 'out/fitted/seed-N'}"
    )
    calls = len(planned)
    more = ForShow(by_width)
    run_comparison(asked(recipe(arms=MATCHED), tmp_path, arms=["plain", "fitted", "wide"], seeds=3),
                   launch=more)  # fmt: skip
    assert len(more.names) == 3
    assert len(planned) == calls  # solved once, and kept
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "task.width solved so that flops are those of wide: 1000 wanted, 1000 planned" in page


def test_a_match_that_cannot_be_leaves_that_arm_out_and_says_why(recipe, tmp_path, planned):
    arms = RECIPE["arms"] | {"fitted": {"match": {"key": "task.seq_len", "to": "wide"}}}  # type: ignore[operator]
    what = asked(recipe(arms=arms), tmp_path, arms=["plain", "fitted", "wide"])
    found = run_comparison(what, launch=ForShow(by_width))
    why = "the planned cost is 680 for 32 and for 16"
    assert found.missing == [f"fitted, seed {seed}: missing, {why}" for seed in (0, 1)]
    assert found.arm("wide").judgement.n == 2


def test_a_matched_arm_without_a_finished_one_to_match_is_missing(recipe, tmp_path, planned):
    def metric(recipe):
        return None if recipe.task["width"] == 32 else by_width(recipe)

    found = run_comparison(
        asked(recipe(arms=MATCHED), tmp_path, arms=["plain", "fitted", "wide"]),
        launch=ForShow(metric),
    )
    assert '"wide" has no finished run whose cost it could match' in found.missing[-1]
    assert found.arm("fitted").judgement is None


@pytest.mark.parametrize(
    ("target", "start", "whole"), [(1000.0, 7, True), (12.34, 2.0, False), (201.0, 300, True)]
)
def test_solve_finds_the_nearest(target, start, whole):
    value, cost = settled.solve(lambda v: 3.0 * v + 1.0, target, start)
    assert isinstance(value, int) is whole
    assert cost == 3.0 * value + 1.0
    assert abs(cost - target) <= (1.5 if whole else 1e-3)


def test_solve_of_a_curve():
    value, cost = settled.solve(lambda v: float(v) ** 2, 2_000.0, 10)
    assert (value, cost) == (45, 2025.0)


def test_an_arm_at_random_is_made_for_each_that_selects(recipe, tmp_path, planned, monkeypatch):
    from sparing.experts.top_k import TopK

    def at_random(cls, options, signals):
        return {
            "top-k": {
                "experts": options["experts"],
                "k": 1,
                "width": round(signals.get("mean_k", 4)),
            }
        }

    monkeypatch.setattr(TopK, "at_random", classmethod(at_random))
    launch = ForShow(by_width)
    found = run_comparison(asked(recipe(), tmp_path, arms=None), launch=launch)
    name = "random at the cost of top-k"
    assert [arm.name for arm in found.arms] == ["plain", "wide", "top-k", name]
    assert launch.names[:2] == ["top-k, seed 0", "top-k, seed 1"]
    settings = found.arm(name).declared["settled"]
    # the mean of what both seeds reported decides, and the cost the mean experts per token
    assert settings["methods.top-k"]["width"] == 2
    assert settings["methods.top-k.k"] == 4
    assert found.arm(name).declared["of"] == "top-k"
    with pytest.raises(RequestError, match='spends what "top-k" does, which is not among the arms'):
        run_comparison(asked(recipe(), tmp_path, arms=["plain", name]), launch=launch)


def test_a_recipe_says_for_which_arms_chance_is_wanted(recipe, tmp_path):
    compare = {**RECIPE["compare"], "random": []}  # type: ignore[dict-item]
    found = run_comparison(
        asked(recipe(compare=compare), tmp_path, arms=None), launch=ForShow(by_width)
    )
    assert [arm.name for arm in found.arms] == ["plain", "wide", "top-k"]


# ---- settings chosen once per arm ----------------------------------------------------------------

TUNED = RECIPE["compare"] | {  # type: ignore[operator]
    "tune": {"keys": {"train.learning_rate": [0.001, 0.003, 0.01]},
             "set": {"task.split": "development", "train.tokens": 1024}}
}  # fmt: skip


def by_rate(recipe) -> float | None:
    rate = recipe.train.learning_rate
    best = 0.01 if recipe.task["width"] == 32 else 0.003
    if rate == 0.001 and recipe.task["width"] == 32:
        return None
    return by_width(recipe) + abs(rate - best)


def test_each_arm_gets_its_best_rate_on_other_data(recipe, tmp_path):
    launch = ForShow(by_rate)
    found = run_comparison(asked(recipe(compare=TUNED), tmp_path), launch=launch)
    assert launch.names[:2] == ["plain, tuning learning_rate=0.001",
                                "plain, tuning learning_rate=0.003"]  # fmt: skip
    assert len(launch.names) == 6 + 4
    tuned = [yaml.safe_load((job.out / "recipe.yaml").read_text()) for job in launch.jobs]
    assert [(r["task"]["split"], r["train"]["tokens"], r["seed"]) for r in tuned[:6]] == [
        ("development", 1024, 1000)
    ] * 6
    assert {r["train"]["learning_rate"] for r in tuned[6:] if r["task"]["width"] == 24} == {0.003}
    assert {r["train"]["learning_rate"] for r in tuned[6:] if r["task"]["width"] == 32} == {0.01}
    tuning = found.arm("wide").declared["tuning"]
    assert tuning["chosen"] == {"train.learning_rate": 0.01}
    assert tuning["note"] == "the best train.learning_rate is at the end of what was tried"
    assert [t["value"] is None for t in tuning["tried"]] == [True, False, False]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "chosen with seed 1000: learning_rate 0.003, of learning_rate 0.001 3.002; " in page
    assert "learning_rate 0.001 diverged" in page
    again = ForShow(by_rate)
    run_comparison(asked(recipe(compare=TUNED), tmp_path), launch=again)
    assert again.names == []
    assert read(tmp_path / "out" / "tuning.json")["arms"]["plain"]["chosen"] == {
        "train.learning_rate": 0.003
    }


def test_what_chance_moves_does_not_choose_a_rate(recipe, tmp_path):
    rule = {"keys": {"train.learning_rate": [0.002, 0.01, 0.003]}, "part": 0.25,
            "set": {"task.split": "development"}, "better_by": 0.005}  # fmt: skip
    launch = ForShow(by_rate)  # worse by 0.001 and 0.008 at the first rate
    tuned = RECIPE["compare"] | {"tune": rule}
    found = run_comparison(asked(recipe(compare=tuned), tmp_path), launch=launch)
    chosen = {arm.name: arm.declared["tuning"]["chosen"] for arm in found.arms}
    assert chosen["plain"] == {"train.learning_rate": 0.002}
    assert chosen["wide"] == {"train.learning_rate": 0.01}
    tokens = [yaml.safe_load((job.out / "recipe.yaml").read_text())["train"]["tokens"]
              for job in launch.jobs]  # fmt: skip
    assert {4 * short for short in tokens[:6]} == set(tokens[6:])


@pytest.mark.parametrize("wrong", [{"part": 0}, {"part": 1.5}, {"better_by": -1}])
def test_a_wrong_rule_to_choose_by_is_refused(recipe, tmp_path, wrong):
    rule = {"keys": {"train.learning_rate": [0.002]}, "set": {"task.split": "development"}, **wrong}
    compare = RECIPE["compare"] | {"tune": rule}
    with pytest.raises(RequestError, match=f"tune.{next(iter(wrong))} must be"):
        run_comparison(asked(recipe(compare=compare), tmp_path), launch=ForShow(by_width))


def test_tuning_that_was_cut_goes_on(recipe, tmp_path):
    launch = ForShow(by_rate, cut_at=2)
    with pytest.raises(Cut):
        run_comparison(asked(recipe(compare=TUNED), tmp_path), launch=launch)
    rest = ForShow(by_rate)
    run_comparison(asked(recipe(compare=TUNED), tmp_path), launch=rest)
    assert len(rest.names) == 8


def test_tuning_on_the_data_to_judge_by_is_refused(recipe, tmp_path):
    tune = {"keys": {"train.learning_rate": [0.1]}, "set": {"train.tokens": 1024}}
    compare = RECIPE["compare"] | {"tune": tune}  # type: ignore[operator]
    with pytest.raises(RequestError, match="would choose settings by the data that the comparison"):
        run_comparison(asked(recipe(compare=compare), tmp_path), launch=ForShow(by_width))


# ---- wrong requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["plain", "wid"]}, 'unknown arm "wid"; did you mean "wide"?'),
        ({"arms": ["wide", "top-k"]}, 'the baseline "plain" is not among the arms wide, top-k'),
        ({"baseline": "top-k"}, 'the baseline "top-k" is not among the arms plain, wide'),
        ({"margin": "0.02 bits_per_byte"}, "margin"),
        ({"margin": "+-0.02"}, "margin"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"looks": 3}, r"looks must be at most seeds \(2\), got 3"),
        ({"budget": -1.0}, "budget must be at least 0, got -1"),
        ({"preset": "explor"}, 'unknown preset "explor"; Known: none'),
        ({"overrides": ("task.dims=3",)}, 'unknown key in task "dims"'),
        ({"level": 1.5}, "level must be in \\[0.5, 1\\], got 1.5"),
    ],
)
def test_wrong_requests_run_nothing(recipe, tmp_path, options, message):
    launch = ForShow(by_width)
    with pytest.raises(RequestError, match=message):
        run_comparison(asked(recipe(), tmp_path, **options), launch=launch)
    assert launch.names == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": None, "compare": None}, "declares no arms to compare"),
        ({"compare": None}, "names no baseline; give one of its arms by --baseline: plain, wide"),
        ({"compare": {"baseline": "plain"}}, "by --margin, such as "),
        ({"compare": {"baseline": "plane"}}, 'compare.baseline "plane"; did you mean "plain"?'),
        ({"compare": {"base": "plain"}}, 'unknown key in recipe.compare "base"'),
        ({"arms": {"plain": {"sets": {}}}}, 'unknown key in recipe.arms.plain "sets"'),
        (
            {"arms": {"plain": {"set": {"task.widht": 3}}, "wide": {}}},
            'the arm "plain": unknown key in task "widht"; did you mean "width"?',
        ),
        (
            {"arms": {"plain": {"match": {"key": "task.width", "to": "wise"}}, "wide": {}}},
            'arms.plain.match.to "wise"; did you mean "wide"?',
        ),
        ({"arms": {"plain": {}, "wide": {}, "a, b": {}}}, 'has a comma in its name.*"a, b"'),
        (
            {"arms": {"plain": {}, "wide": {}, "Plain!": {}}, "n": 3},
            'two arms would share the directory "plain"',
        ),
    ],
)
def test_wrong_recipes_run_nothing(recipe, tmp_path, changes, message):
    launch = ForShow(by_width)
    chosen = None if changes.pop("n", 0) else ["plain", "wide"]
    with pytest.raises(RequestError, match=message):
        run_comparison(asked(recipe(**changes), tmp_path, arms=chosen), launch=launch)
    assert launch.names == []


def test_a_directory_of_something_else_is_refused(recipe, tmp_path):
    launch = ForShow(by_width)
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(RequestError, match="out is not a directory"):
        run_comparison(asked(recipe(), tmp_path), launch=launch)
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(RequestError, match="is not empty and holds no comparison"):
        run_comparison(asked(recipe(), tmp_path), launch=launch)
    (out / "thesis.tex").unlink()
    run_comparison(asked(recipe(), tmp_path), launch=launch)
    with pytest.raises(RequestError, match=r"holds a comparison with another -s: \[\] there and"):
        run_comparison(asked(recipe(), tmp_path, overrides=("task.dim=32",)), launch=launch)
    other = RECIPE["arms"] | {"wide": {"set": {"task.width": 48}}}  # type: ignore[operator]
    with pytest.raises(RequestError, match=r'than the arm "wide" has now: task.width; choose'):
        run_comparison(asked(recipe(arms=other), tmp_path), launch=launch)
    assert len(launch.names) == 4


def test_runs_from_before_an_option_existed_are_kept(recipe, tmp_path):
    launch = ForShow(by_width)
    run_comparison(asked(recipe(), tmp_path), launch=launch)
    for job in launch.jobs:  # as a version without the option wrote it
        file = job.out / "recipe.yaml"
        held = yaml.safe_load(file.read_text())
        del held["train"]["clip"]
        file.write_text(yaml.safe_dump(held))
    again = ForShow(by_width)
    run_comparison(asked(recipe(), tmp_path), launch=again)
    assert again.names == []
    held["train"]["no_such_option"] = 1
    file.write_text(yaml.safe_dump(held))
    with pytest.raises(RequestError, match=r"has now: train\.(clip|no_such_option); choose"):
        run_comparison(asked(recipe(), tmp_path), launch=again)


def test_two_comparisons_do_not_share_a_directory(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "PATIENCE", 0.2)
    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out" / ".lock", os.O_RDWR | os.O_CREAT)
    os.write(held, b"4711")
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(RequestError, match=r"another comparison \(process 4711\) is at work in"):
        run_comparison(asked(recipe(), tmp_path), launch=ForShow(by_width))
    os.close(held)
    run_comparison(asked(recipe(), tmp_path), launch=ForShow(by_width))


# ---- for real ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_references")
def test_two_arms_by_two_seeds_of_the_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_SMOKE", "1")
    what = Asked(
        recipe="language-dynmoe",
        out=tmp_path / "out",
        seeds=2,
        arms=["dynmoe", "dense"],
        baseline="dense",
        overrides=("task.domains=[shakespeare]", "train.precision=fp32"),
    )
    found = run_comparison(what, launch=InProcess())
    assert found.missing == []
    assert found.arm("dynmoe").judgement.documents is not None
    costs = [found.arm(name).costs["flops"] for name in ("dynmoe", "dense")]
    assert costs[0] == pytest.approx(costs[1], rel=0.02)
    assert found.arm("dense").declared["match"]["planned"] == pytest.approx(costs[1], rel=1e-3)
    state = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert state["arms"]["dense"]["runs"][1]["path"] == "dense/seed-1"
    values = {name: found.arm(name).values for name in ("dynmoe", "dense")}
    again = sparing.compare(
        {name: [tmp_path / "out" / name / f"seed-{s}" for s in (0, 1)] for name in values},
        baseline="dense",
        margin="+-0.02 bits_per_byte",
    )
    assert {arm.name: arm.values for arm in again.arms} == values
