"""What is refused, by whom, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.convert.dense import load, logits, saved
from tests.experts.zoo import inputs

from sparing.convert import Conversion, convert, plan, to_dense
from sparing.convert.skeleton import described
from sparing.core.errors import RequestError, RunError


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return saved(tmp_path, "llama")


def test_no_directory_no_configuration_no_weights(tmp_path: Path, dense: Path):
    with pytest.raises(RequestError, match="no directory"):
        plan(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"no config\.json"):
        plan(tmp_path / "empty")
    (dense / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="holds no weights"):
        plan(dense)
    (dense / "pytorch_model.bin").touch()
    with pytest.raises(RequestError, match="save_pretrained"):
        plan(dense)


def test_a_missing_shard_is_named(tmp_path: Path):
    path = saved(tmp_path, "llama", shard="10KB")
    gone = sorted(path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(RunError, match=gone.name):
        plan(path)


@pytest.mark.parametrize("left", [4, 100, -1])
def test_a_cut_file_is_damaged(left: int, dense: Path):
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(RunError, match="damaged or cut short"):
        plan(dense)


def test_a_tensor_that_is_missing_or_has_another_shape(dense: Path):
    file = dense / "model.safetensors"
    tensors = load_file(file)
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    save_file({**tensors, "model.layers.0.mlp.up_proj.weight": up[:-1].contiguous()}, file)
    with pytest.raises(RunError, match="do not belong together"):
        plan(dense)


def test_quantised_checkpoints(dense: Path):
    config = json.loads((dense / "config.json").read_text())
    body = {**config, "quantization_config": {"quant_method": "gptq"}}
    (dense / "config.json").write_text(json.dumps(body))
    with pytest.raises(RequestError, match=r"quantised \(gptq\)"):
        plan(dense)
    (dense / "config.json").write_text(json.dumps(config))
    file = dense / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    with pytest.raises(RequestError, match="quantised"):
        plan(dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4, "active": 5}, "active must be at most experts"),
        ({"experts": 1}, "experts must be at least 2"),
        ({"experts": 4, "active": 2, "residual": 2}, "residual must be below active"),
        ({"method": "kmean"}, 'did you mean "kmeans"'),
        ({"scale": "publishd"}, 'did you mean "published"'),
        ({"gate": "zeros"}, 'did you mean "zero"'),
        ({"scale": -1.0}, "scale must be at least 1e-06"),
        ({"scale": "learned", "router": "top-p"}, "follows softmax top-k"),
        ({"method": "copy", "scale": 2.0}, "need no scale"),
        ({"noise": 0.1}, "noise is for"),
        ({"form": "export", "compensate": "mean"}, "expert biases"),
        ({"form": "export", "router": "dynmoe"}, "softmax top-k"),
        ({"method": "sharing-inter", "residual": 0}, "needs residual"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str):
    with pytest.raises(RequestError, match=message):
        Conversion(**options)  # type: ignore[arg-type]


def test_experts_that_do_not_fit(dense: Path):
    with pytest.raises(RequestError, match="48 hidden units cannot be cut into 49"):
        plan(dense, Conversion(experts=49))
    with pytest.raises(RequestError, match="leaves none"):
        plan(dense, Conversion(first_dense=1, last_dense=1))
    with pytest.raises(RequestError, match="routes to no experts"):
        plan(dense, Conversion(router="infobatch"))


def test_models_that_cannot_be_exported_say_why(tmp_path: Path):
    path = saved(tmp_path, "gemma")
    with pytest.raises(RequestError, match='differs from "gemma"'):
        plan(path, Conversion(experts=4, form="export"))


def test_a_gate_with_a_bias(tmp_path: Path):
    path = saved(tmp_path, "llama", mlp_bias=True)
    assert plan(path, Conversion(experts=4)).form == "sparing"
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.gate_proj.bias"] += 1
    save_file(tensors, file)
    with pytest.raises(RequestError, match="has a bias"):
        plan(path, Conversion(experts=4))


def t5(path: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    with torch.random.fork_rng():
        T5ForConditionalGeneration(config).eval().save_pretrained(path)
    return path


def test_an_unknown_feed_forward_is_described_by_hand(tmp_path: Path):
    path, out = t5(tmp_path / "t5"), tmp_path / "out"
    with pytest.raises(RequestError, match=r"T5DenseActDense \(.* with wi, wo\).*--block"):
        plan(path)
    family = described("up=wi,down=wo,act=act,inner=dropout")
    options = Conversion(experts=4, active=4, scale="unit", gate="zero")
    made = convert(path, out, options, family=family)
    assert made.planned.blocks == 2
    dense, sparse = load(path), load(out)
    batch = {**inputs(dense), "decoder_input_ids": torch.tensor([[0, 3], [0, 4]])}
    torch.testing.assert_close(logits(sparse, batch), logits(dense, batch), rtol=1e-4, atol=1e-4)
    for text, message in (("up=wi", "lacks down, act"), ("wi", "no part"), ("x=1", "no part")):
        with pytest.raises(RequestError, match=message):
            described(text)


def test_an_out_that_exists_or_a_disk_that_is_too_small(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="exists already"):
        convert(dense, out, Conversion(experts=4))
    assert (out / "mine.txt").read_text() == "mine"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 10, 1000))
    with pytest.raises(RunError, match="free some space"):
        convert(dense, tmp_path / "new" / "out", Conversion(experts=4))
    assert not (tmp_path / "new").exists()


def test_a_result_that_reads_back_wrong_is_not_kept(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from sparing.convert import pieces

    def wrong(self: object, *arguments: object) -> torch.Tensor:
        found = right(self, *arguments)
        found.view(-1)[0] += 1
        return found

    right = pieces.Pieces.expert
    monkeypatch.setattr(pieces.Pieces, "expert", wrong)
    with pytest.raises(RunError, match="written with a wrong"):
        convert(dense, tmp_path / "out", Conversion(experts=4))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_overlapping_experts_have_no_way_back(dense: Path, tmp_path: Path):
    convert(dense, tmp_path / "out", Conversion(experts=2, active=1, method="copy"))
    with pytest.raises(RequestError, match="overlap"):
        to_dense(tmp_path / "out", tmp_path / "back")
    with pytest.raises(RequestError, match="no model that sparing converted"):
        to_dense(dense, tmp_path / "back")


def test_a_bare_models_names_have_no_prefix(tmp_path: Path):
    """GPT-2's own checkpoint is of the model without a head."""
    path, out = saved(tmp_path, "gpt2"), tmp_path / "out"
    file = path / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file)
    made = convert(path, out, Conversion(experts=4, active=4, scale="unit", gate="zero"))
    assert made.planned.reading == "one tensor at a time"
    dense = load(path)
    batch = inputs(dense)
    torch.testing.assert_close(logits(load(out), batch), logits(dense, batch), rtol=1e-4, atol=1e-4)


def test_a_model_of_no_class_in_transformers(dense: Path):
    config = json.loads((dense / "config.json").read_text())
    for key in ("auto_map", "model_type"):
        config.pop(key, None)
    (dense / "config.json").write_text(json.dumps({**config, "architectures": ["Mine"]}))
    with pytest.raises(RequestError, match=r"does not name a model|is of no class"):
        plan(dense)
