"""Conversion at the start of training: the same weights as on disk, and what is cut or kept."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.convert.dense import STORIES, load, logits, saved
from tests.convert.killed_recovery import short
from tests.experts.zoo import build, inputs

import sparing
from sparing.convert import Conversion, convert, fitting, simulating
from sparing.convert.in_memory import emptied
from sparing.convert.pieces import Decision
from sparing.convert.split import split
from sparing.core.errors import RequestError
from sparing.core.method import Setup, arrange
from sparing.experts.families import feed_forwards
from sparing.experts.layer import expert_layers
from sparing.run import plan, runner
from sparing.run.compare.arms import as_overrides
from sparing.run.recipe import load as load_recipe
from sparing.run.report.read import read
from sparing.run.report.recovery import recovery
from sparing.tasks.continued import Continued

BEST: dict[str, Any] = {"method": "coactivation", "gate": "distilled", "compensate": "mean"}


def looked_at(model: Any) -> list[dict[str, torch.Tensor]]:
    made = [inputs(model, rows=4, length=8, seed=seed) for seed in range(3)]
    return [{**batch, "labels": batch["input_ids"]} for batch in made]


def setup_of(batches: Any, seed: int = 3) -> Setup:
    return Setup(seed=seed, batches=lambda: batches, loss=lambda model, batch: model(**batch).loss)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {**BEST, "residual": 1, "active": 3}),
        ("llama", {"method": "gradient", "scale": "learned", "learn_steps": 2, "gate": "random"}),
        ("llama", {"method": "copy", "noise": 0.1, "seed": 0}),
        ("llama", {**BEST, "text": "own", "sequences": 6, "length": 9}),
        ("phi3", {"method": "kmeans", "last_dense": 1}),
        ("gpt2", {**BEST, "compensate": "none"}),
        ("gpt2", {**BEST, "refit": True, "residual": 1, "active": 3}),
    ],
)
def test_weights_are_those_that_the_command_writes(
    name: str, options: dict[str, Any], tmp_path: Path
):
    path = saved(tmp_path, name)
    model = load(path)
    batches = looked_at(model)
    method = sparing.Convert(**{"experts": 4, "sequences": 12, **options})
    training = model.train().training
    method.prepare(model, setup_of(batches))
    assert model.training == training
    given = method.options.reads and method.options.text == "training"
    convert(
        path, tmp_path / "out", method.options.conversion(3), batches=batches if given else None
    )
    expected = sparing.load(tmp_path / "out").state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not found[key].equal(expected[key])] == []
    batch = inputs(model, seed=9)
    out = logits(model.eval(), batch)
    sparing.save(model, tmp_path / "saved")
    assert logits(sparing.load(tmp_path / "saved"), batch).equal(out)


def test_padding_of_a_loops_batches_is_not_looked_at():
    model = build("llama")
    ids = torch.randint(3, 50, (6, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    found = []
    for filled in (0, 41):
        one = {"input_ids": ids.masked_fill(mask == 0, filled), "attention_mask": mask}
        one["labels"] = ids.masked_fill(mask == 0, -100)
        method = sparing.Convert(experts=4, sequences=6, **BEST)
        made = method.prepare(load_again(model), setup_of([one]))
        found.append(made.state_dict())
    assert [key for key in found[0] if not found[0][key].equal(found[1][key])] == []


def load_again(model: torch.nn.Module) -> Any:
    fresh = build("llama")
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_a_cut_model_is_the_dense_one_without_the_least_important_units(tmp_path: Path):
    model = build("llama")
    batches = looked_at(model)
    whole = load_again(model)
    method = sparing.Convert(experts=4, active=1, method="cut", sequences=12)
    method.prepare(model, setup_of(batches))
    width = feed_forwards(whole)[0].width
    blocks = feed_forwards(model)
    assert (
        {block.width for block in blocks} == {round(width / 4)} == {model.config.intermediate_size}
    )
    kept = {}
    for ours, theirs in zip(blocks, feed_forwards(whole), strict=True):
        rows = (ours.read()["up"][:, None] == theirs.read()["up"][None]).all(2)
        best = rows.int().argmax(1)
        assert rows.sum(1).tolist() == [1] * len(best)
        rest = torch.tensor(sorted(set(range(width)) - set(best.tolist())))
        kept[theirs.path] = Decision(
            split=split([rest], best), scale=0.0, gate=torch.zeros(1, theirs.dim)
        )
    batch = inputs(whole, seed=5)
    with simulating.converted(feed_forwards(whole), kept, fitting.softmax_top_k(1)):
        expected = logits(whole.eval(), batch)
    torch.testing.assert_close(logits(model.eval(), batch), expected)
    model.save_pretrained(tmp_path / "cut")
    again = sparing.Convert.imported(tmp_path / "cut", lambda: model)
    assert logits(again, batch).equal(logits(model, batch))
    with pytest.raises(RequestError, match="separate linear layers"):
        sparing.Convert(method="cut", sequences=4).prepare(
            build("gpt2"), setup_of(looked_at(build("gpt2")))
        )


def test_a_converted_model_keeps_its_experts(tmp_path: Path):
    path = saved(tmp_path, "llama")
    convert(path, tmp_path / "out", Conversion(experts=4, active=3, form="sparing", seed=5))
    model = sparing.load(tmp_path / "out")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = sparing.Convert(experts=8, active=2)
    method.prepare(model, Setup(seed=0))
    assert isinstance(method.experts, sparing.TopK)
    assert (method.experts.slots, method.experts.expected_k) == (4, 3.0)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RequestError, match="has experts already"):
        sparing.Convert(method="cut").prepare(model, Setup(seed=0))


def test_nothing_is_copied_to_see_the_structure():
    model = build("gpt2")  # with tied weights
    empty = emptied(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "coactivatoin"}, 'did you mean "coactivation"'),
        ({"method": "cut", "first_dense": 1}, "cuts all blocks alike"),
        ({"experts": 2, "active": 3}, "active must be at most experts"),
        ({"text": "mine"}, 'unknown text "mine"'),
        ({"router": "mix"}, "routes to no experts"),
        ({"method": "gradient"}, "this loop does not tell"),
        ({"experts": 400}, "cannot be cut into 400"),
    ],
)
def test_wrong_requests_are_told(options: dict[str, Any], told: str):
    with pytest.raises(RequestError, match=told):
        sparing.Convert(**options).prepare(build("llama"), Setup(seed=0))


def test_models_and_methods_that_do_not_fit_are_told():
    with pytest.raises(RequestError, match="no feed-forward block was recognised"):
        sparing.Convert().prepare(torch.nn.Sequential(torch.nn.Linear(2, 2)), Setup(seed=0))
    with pytest.raises(RequestError, match="both make experts"):
        arrange([sparing.Convert(), sparing.TopK()])


def test_a_run_begins_at_the_converted_checkpoints_loss_and_its_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = short("methods.convert.text=own", "methods.convert.length=16", "watch.evaluate=0.5")
    runner.run(recipe, tmp_path / "run")
    found = read(tmp_path / "run")
    options = recipe.build_methods()[0].options.conversion(recipe.seed)
    convert(STORIES, tmp_path / "out", options)
    task = Continued(**{key: value for key, value in recipe.task.items() if key != "name"})
    task.prepare(recipe.seed)
    expected = task.evaluate(sparing.load(tmp_path / "out"))
    assert found.evals[0]["step"] == 0
    for name, value in expected.items():
        assert found.evals[0][name] == pytest.approx(value, abs=1e-6)
    dense = task.evaluate(task.model(0))
    shown = recovery(found)
    assert shown is not None
    assert [row["name"] for row in shown["rows"]] == ["shakespeare", "gsm8k", "mean"]
    assert shown["rows"][-1]["before"] == f"{dense['nats_per_token']:.3f}"
    assert shown["rows"][-1]["start"] == f"{expected['nats_per_token']:.3f}"
    assert [c.title.split(",")[0] for c in shown["charts"]] == [
        "nats per token against tokens",
        "nats per token against FLOPs",
    ]
    assert "From the start" in (tmp_path / "run" / "report.html").read_text()
    trained = sparing.load(tmp_path / "run")
    assert len(expert_layers(trained)) == 5
    assert task.evaluate(trained)["nats_per_token"] == pytest.approx(found.value, abs=1e-6)


@pytest.mark.parametrize("preset", [None, "own", "large"])
def test_the_arms_of_the_comparison_are_sets_of_options(preset: str | None):
    kinds = {}
    for name, arm in load_recipe("language-convert").arms.items():
        made = load_recipe("language-convert", as_overrides(arm.set), preset=preset)
        methods = {method.name: method for method in made.build_methods()}
        assert methods["mix"].options.rule == (
            "uniform"
            if preset == "own" or name in ("dense", "uniform") or "cut" in name
            else "gate-load"
        )
        kinds[name] = methods["convert"].options if "convert" in methods else None
    assert kinds["dense"] is None
    assert [kinds[name].method for name in ("cut", "cut and fitted")] == ["cut", "cut"]
    fitted = {name for name, options in kinds.items() if options is not None and options.refit}
    named = {"converted", "with AdamW", "uniform", "cut and fitted", "with shared experts"}
    assert fitted == named
    published = kinds["published"]
    assert published.router == "noisy-top-k", "LLaMA-MoE's gate has learned noise"
    assert (published.method, published.scale, published.gate) == ("random", "published", "random")
    assert not published.reads
    assert kinds["published with AdamW"] == published
    assert kinds["converted"] == kinds["uniform"] == kinds["with AdamW"]
    shares = {k.active / k.experts for k in kinds.values() if k is not None}
    assert shares == {1 / 4}


def test_a_plan_tells_what_is_converted():
    made = plan.plan(short())
    assert len(made["methods"]["convert"]) == 2 * 5
    assert "becomes 4 of 4 experts of width 44" in made["methods"]["convert"][-1]
    assert made["flops"]["spent"] < made["flops"]["dense"]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path):
    script = Path(__file__).with_name("killed_recovery.py")
    killed = subprocess.run([sys.executable, str(script), str(tmp_path / "killed")], check=False)
    assert killed.returncode == -signal.SIGKILL
    runner.run(short(), tmp_path / "killed", resume=True, page=False)
    runner.run(short(), tmp_path / "whole", page=False)
    states = [
        load_file(next((tmp_path / name / "checkpoint").iterdir()) / "tensors.safetensors")
        for name in ("killed", "whole")
    ]
    assert states[0].keys() == states[1].keys()
    assert [key for key in states[0] if not states[0][key].equal(states[1][key])] == []
