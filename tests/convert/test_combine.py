"""Experts of several fine-tunes of one base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.convert.dense import load, logits, saved
from tests.experts.zoo import build, inputs
from typer.testing import CliRunner

from sparing.cli import app
from sparing.convert import Conversion, combine, to_dense
from sparing.core.errors import RequestError


def models(tmp_path: Path, name: str = "llama", count: int = 3) -> list[Path]:
    paths = []
    for seed in range(count):
        paths.append(tmp_path / f"{name}{seed}")
        build(name, seed=seed).save_pretrained(paths[-1])
    return paths


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_blocks_become_experts_and_the_rest_is_averaged(name: str, tmp_path: Path):
    paths, out = models(tmp_path, name), tmp_path / "out"
    options = Conversion(experts=3, active=3, method="copy", gate="zero")
    combine(paths, out, options)
    dense = [load(path) for path in paths]
    mean = build(name, seed=0)
    with torch.no_grad():
        states = [model.state_dict() for model in dense]
        for key, value in mean.state_dict().items():
            value.copy_(torch.stack([state[key] for state in states]).mean(0))
    # with even weights a layer's experts give the mean of the models' blocks
    from sparing.experts.families import feed_forwards

    blocks = [{b.path: b for b in feed_forwards(model)} for model in dense]
    for block in feed_forwards(mean):
        own = [found[block.path] for found in blocks]

        def even(module: object, args: tuple[torch.Tensor], y: object, own: list = own):
            x = args[0].flatten(0, -2)
            return torch.stack([b.dense(x) for b in own]).mean(0).view(args[0].shape)

        block.body.register_forward_hook(even)
    batch = inputs(mean)
    torch.testing.assert_close(logits(load(out), batch), logits(mean, batch), rtol=1e-4, atol=1e-4)
    with pytest.raises(RequestError, match='made by "several models"'):
        to_dense(out, tmp_path / "back")


def test_equal_models_give_themselves(tmp_path: Path):
    path = saved(tmp_path, "llama")
    combine([path, path], tmp_path / "out")
    dense = load(path)
    batch = inputs(dense)
    torch.testing.assert_close(
        logits(load(tmp_path / "out"), batch), logits(dense, batch), rtol=1e-4, atol=1e-4
    )


def test_what_is_refused(tmp_path: Path):
    a, b = models(tmp_path, count=2)
    with pytest.raises(RequestError, match="two or more"):
        combine([a], tmp_path / "out")
    with pytest.raises(RequestError, match="2 models make 2 experts"):
        combine([a, b], tmp_path / "out", Conversion(experts=3, method="copy"))
    with pytest.raises(RequestError, match="whole blocks"):
        combine([a, b], tmp_path / "out", Conversion(experts=2))
    wider = saved(tmp_path / "wide", "llama", intermediate_size=64)
    with pytest.raises(RequestError, match=r"no fine-tune of the same base.*shape"):
        combine([a, wider], tmp_path / "out")
    other = saved(tmp_path / "other", "gpt2")
    with pytest.raises(RequestError, match="GPT2LMHeadModel, not a LlamaForCausalLM"):
        combine([a, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(tmp_path: Path):
    a, b = map(str, models(tmp_path, count=2))
    out = str(tmp_path / "out")
    result = CliRunner().invoke(app, ["convert", "--from", a, b, out, "--quiet"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert load(tmp_path / "out").config.num_local_experts == 2
    result = CliRunner().invoke(app, ["convert", a, b, str(tmp_path / "no"), "--quiet"])
    assert result.exit_code == 2
    assert "write --from" in result.stderr
