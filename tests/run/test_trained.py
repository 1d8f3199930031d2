"""What a run has trained comes back by ``sparing.load``: base, adapter and experts together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import nn

import sparing
from sparing.core.errors import RequestError
from sparing.run.directory import RunDirectory
from sparing.run.recipe import available, load
from sparing.run.runner import run

SMALL = (
    "task.max_length=16",
    "train.precision=fp32",
    "train.threads=1",
    "train.tokens=1600",
    "train.batch_size=16",
    "watch.evaluate=1",
)


def text(*overrides: str) -> Any:
    return load("adapters-text", [*SMALL, *overrides], smoke=True)


def summary_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return found


@pytest.mark.parametrize("name", sorted(available()))
def test_a_run_of_each_recipe_is_loaded_and_measures_the_same(name, smoke_run):
    path = smoke_run(name).path
    recipe = RunDirectory(path).recipe()
    assert recipe is not None
    task = recipe.build_task()
    task.prepare(recipe.seed)
    model = sparing.load(path)
    assert not model.training
    summary = summary_of(path)
    with torch.autocast("cpu", torch.bfloat16, enabled=summary["precision"]["chosen"] == "bf16"):
        metrics = task.evaluate(model)
    assert metrics == pytest.approx(summary["metrics"], abs=1e-9)


@pytest.mark.parametrize(
    "method",
    [
        {"sparse-adapter": {"kind": "lora", "keep": 0.5, "score": "random"}},
        {"sparse-adapter": {"kind": "houlsby", "pattern": "unit", "keep": 0.5, "width": 4}},
        {"peft": {"kind": "lora", "r": 2}},
        {"peft": {"kind": "shira", "r": 2}},
        {"top-k": {"experts": 2, "k": 1}},
        {"dynmoe": {"max_experts": 3}},
        {},
    ],
    ids=["lora", "units", "peft-lora", "peft-shira", "top-k", "dynmoe", "full"],
)
def test_what_is_trained_on_texts_comes_back_without_its_data(method, tmp_path, monkeypatch):
    recipe = text(f"methods={json.dumps(method)}")
    summary = run(recipe, tmp_path / "run", page=False)
    task = recipe.build_task()
    task.prepare(0)
    monkeypatch.setattr("sparing.tasks.text.sources.load", None)  # data is not needed for it
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        assert task.evaluate(sparing.load(path)) == summary["metrics"]


def test_the_account_compares_an_adapters_flops_with_those_of_training_the_whole(tmp_path):
    arms = {"adapter": [], "peft": ['methods={"peft": {"r": 2}}'], "full": ["methods={}"]}
    found = {}
    for name, overrides in arms.items():
        ledger = run(text(*overrides), tmp_path / name, page=False)["ledger"]
        found[name] = ledger["flops"]
        if name != "full":
            files = (tmp_path / name / "model").rglob("*")
            assert ledger["bytes"]["spent"] == sum(f.stat().st_size for f in files if f.is_file())
    whole = found.pop("full")
    assert whole["spent"] == whole["dense"]
    for entry in found.values():
        assert entry["spent"] < entry["dense"] == whole["spent"]


def test_an_adapter_is_loaded_on_the_model_that_is_given(tmp_path):
    recipe = text()
    summary = run(recipe, tmp_path / "run", page=False)
    task = recipe.build_task()
    task.prepare(0)
    given = task.model(0)
    assert sparing.load(tmp_path / "run", given) is given
    assert task.evaluate(given) == summary["metrics"]
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "alone")
    with pytest.raises(RequestError, match="an adapter without its base; give the model"):
        sparing.load(tmp_path / "alone")
    assert task.evaluate(sparing.load(tmp_path / "alone", task.model(0))) == summary["metrics"]
    other = task.model(0)
    nn.init.normal_(other.encoder.embeddings.word_embeddings.weight)
    with pytest.raises(RequestError, match="trained on another base"):
        sparing.load(tmp_path / "run", other)


def test_experts_in_a_model_of_ones_own_are_loaded_into_one_like_it(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 11}
            self.inner = LlamaModel(LlamaConfig(**shape, **heads))

    model = sparing.moefy_(Mine(), sparing.TopK(experts=3, k=1)).eval()
    sparing.save(model, tmp_path / "mine")
    ids = torch.arange(10).view(2, 5)
    found = sparing.load(tmp_path / "mine", Mine())
    wanted = model.inner(input_ids=ids).last_hidden_state
    assert torch.equal(found.inner(input_ids=ids).last_hidden_state, wanted)
    with pytest.raises(RequestError, match=r"of no class in transformers.*load\(path, model="):
        sparing.load(tmp_path / "mine")


def test_a_run_that_has_no_model_says_so(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.write_recipe(tiny())
    with pytest.raises(RequestError, match="has not come to its end, and has no model yet"):
        sparing.load(directory.path)
    with pytest.raises(RequestError, match="there is no directory"):
        sparing.load(tmp_path / "nothing")
