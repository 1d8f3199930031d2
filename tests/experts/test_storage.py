from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.experts.zoo import build, inputs
from torch import nn

from sparing.core.errors import RequestError, RunError
from sparing.experts.layer import expert_layers
from sparing.experts.moefy import moefy_
from sparing.experts.storage import load, save
from sparing.experts.top_any import TopAny
from sparing.experts.top_k import TopK


def small(**changes: Any) -> Any:
    return moefy_(build("llama", **changes), TopAny(max_experts=4, adapt=None), seed=3)


def same(left: nn.Module, right: nn.Module) -> None:
    one, two = left.state_dict(), right.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype, name
        assert torch.equal(value, two[name]), name
    with torch.no_grad():
        batch = inputs(left)
        assert torch.equal(left(**batch).logits, right(**batch).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "bert", "roberta", "vit"])
def test_what_is_loaded_gives_identical_logits(family: str, tmp_path: Path) -> None:
    model = moefy_(build(family), TopAny(max_experts=4), experts="copy", noise=0.3)
    for layer in expert_layers(model):
        layer.router.active[1] = False
        layer.router.threshold.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    save(model, tmp_path / "model")
    before = torch.get_rng_state()
    loaded = load(tmp_path / "model")
    assert torch.equal(before, torch.get_rng_state())
    assert not loaded.training
    assert type(loaded) is type(model)
    assert not expert_layers(loaded)[0].router.active[1]
    assert [layer.name for layer in expert_layers(loaded)] == [
        layer.name for layer in expert_layers(model)
    ]
    assert loaded.sparing["surgeries"][0]["blocks"] == model.sparing["surgeries"][0]["blocks"]
    same(model, loaded)


def test_several_surgeries_types_ties_and_attention_come_back(tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=True)
    model.set_attn_implementation("eager")
    moefy_(model, TopK(experts=3, k=2), where=lambda name, _: ".1." in name, width=8)
    model.to(torch.bfloat16)
    moefy_(model, TopAny(max_experts=2, target_k=1.5), where=0)
    save(model, tmp_path / "m")
    loaded = load(str(tmp_path / "m"))
    assert loaded.config._attn_implementation == "eager"
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.model.layers[0].mlp.router.similarity.dtype == torch.float32
    assert loaded.model.layers[1].mlp.router.similarity.dtype == torch.bfloat16
    same(model, loaded)
    # and what was loaded can be trained, saved and loaded again
    loaded.train()(**inputs(loaded)).logits.float().square().mean().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    save(loaded.eval(), tmp_path / "m")
    same(loaded, load(tmp_path / "m"))


def test_a_new_save_replaces_the_model_and_keeps_what_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(small(), path)
    (path / "tokenizer.json").write_text("{}")
    (path / "extra").mkdir()
    (path / "extra" / "note").write_text("x")
    other = moefy_(build("llama", seed=9), TopK(experts=2, k=1))
    save(other, path)
    assert (path / "tokenizer.json").read_text() == "{}"
    assert (path / "extra" / "note").read_text() == "x"
    same(other, load(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_keeps_the_previous_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "m", small()
    save(model, path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparing.experts.storage.save_file", full)
    with pytest.raises(RunError, match="No space left"):
        save(small(), path)
    same(model, load(path))


def test_the_settings_of_generation_come_back(tmp_path: Path) -> None:
    model = small()
    model.generation_config.max_new_tokens = 3
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    ids = inputs(loaded)["input_ids"]
    mask = torch.ones_like(ids)
    assert loaded.generate(ids, attention_mask=mask, do_sample=False).shape[1] <= ids.shape[1] + 3


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="it has no experts"):
        save(build("llama"), tmp_path / "a")
    inner = build("llama")
    moefy_(inner.model, TopK())
    with pytest.raises(RequestError, match="a part of it"):
        save(inner, tmp_path / "a")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "only-copy.tex").write_text("x")
    with pytest.raises(RequestError, match="holds other files"):
        save(small(), tmp_path / "thesis")
    with pytest.raises(RequestError, match="is a file"):
        save(small(), tmp_path / "thesis" / "only-copy.tex")
    assert (tmp_path / "thesis" / "only-copy.tex").read_text() == "x"
    assert not (tmp_path / "a").exists()


def test_what_is_no_saved_model(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no directory"):
        load(tmp_path / "none")
    with pytest.raises(RequestError, match=r"sparing\.json is missing"):
        load(tmp_path)
    build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(RequestError, match=r"AutoModel\.from_pretrained"):
        load(tmp_path / "dense")
    plain = nn.Sequential(build("llama").model.layers[0].mlp)
    save(moefy_(plain, TopK()), tmp_path / "plain")
    with pytest.raises(RequestError, match="give a model as it was before moefy_"):
        load(tmp_path / "plain")


def test_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(small(), path)
    note = json.loads((path / "sparing.json").read_text())
    weights = (path / "model.safetensors").read_bytes()

    def wrote(**changes: Any) -> None:
        (path / "sparing.json").write_text(json.dumps({**note, **changes}))

    (path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(RunError, match="damaged or cut short"):
        load(path)
    (path / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(RunError, match="damaged or cut short"):
        load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(RunError, match="damaged or cut short"):
        load(path)
    (path / "model.safetensors").write_bytes(weights)
    assert note["format"] == 1  # which earlier versions read
    wrote(format=4)
    with pytest.raises(RunError, match="format 4, and this version reads up to 3"):
        load(path)
    wrote(**{"class": "LlamaForTelepathy"})
    with pytest.raises(RunError, match="LlamaForTelepathy, which transformers"):
        load(path)
    (path / "sparing.json").write_text(json.dumps(note)[:-40])
    with pytest.raises(RunError, match="damaged or cut short"):
        load(path)
    (path / "sparing.json").write_text("[1]")
    with pytest.raises(RunError, match="damaged or cut short"):
        load(path)
    (path / "sparing.json").write_text("{}")
    with pytest.raises(RunError, match="damaged or cut short"):
        load(path)
    blocks = dict(note["surgeries"][0]["blocks"])
    del blocks["model.layers.1.mlp"]
    wrote(surgeries=[{**note["surgeries"][0], "blocks": blocks}])
    with pytest.raises(RunError, match=r"missing model\.layers\.1\.mlp.* unexpected model\.layers"):
        load(path)
    wrote(surgeries=[{**note["surgeries"][0], "blocks": {**blocks, "model.layers.1.mlp": 7}}])
    with pytest.raises(RunError, match="the model expects"):
        load(path)
    wrote()
    load(path)
