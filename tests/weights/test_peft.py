"""LoRA in PEFT's files, beside PEFT itself where it is installed."""

from __future__ import annotations

import json

import pytest
import torch
from models import SMALL, batch, bert, gpt2, llama, logits, mlp, train_
from safetensors.torch import load_file, save_file

from sparing.core.errors import RequestError, RunError
from sparing.weights import installed
from sparing.weights.adapters import SparseAdapter, adapt_
from sparing.weights.peft import CONFIG, WEIGHTS, from_peft_, to_peft
from sparing.weights.switching import disabled

FAMILIES = {"bert": bert, "gpt2": gpt2, "llama": llama}
every_family = pytest.mark.parametrize("family", FAMILIES)


def adapted(model, steps=3, **options):
    chosen = {"kind": "lora", "score": "random", "keep": 0.5, **SMALL, **options}
    adapt_(model, SparseAdapter(**chosen), data=[batch(model)])
    return train_(model, steps).eval()


def masks(model):
    return {
        f"{path}.{name}": factor.mask()
        for path, part in installed.parts(model, "default").items()
        for name, factor in part.named_factors()
    }


@every_family
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("pattern", ["entry", "unit"])
def test_a_round_trip_gives_equal_logits_and_masks(family, steps, pattern, tmp_path):
    model = adapted(FAMILIES[family](), steps, pattern=pattern, targets="all-linear")
    to_peft(model, tmp_path / "p")
    again = from_peft_(FAMILIES[family](), tmp_path / "p")
    assert logits(again).equal(logits(model))
    found, expected = masks(again), masks(model)
    kept = {name: mask for name, mask in expected.items() if mask.numel()}
    assert list(found) == list(kept)
    assert all(found[name].equal(mask) for name, mask in kept.items())
    with disabled(again):
        assert logits(again).equal(logits(FAMILIES[family]()))


def test_masks_are_found_from_zeros_alone(tmp_path):
    model = adapted(bert())
    to_peft(model, tmp_path / "p")
    tensors = load_file(tmp_path / "p" / WEIGHTS)
    save_file(tensors, tmp_path / "p" / WEIGHTS, metadata={"format": "pt"})
    again = from_peft_(bert(), tmp_path / "p")
    assert all(mask.equal(masks(again)[name]) for name, mask in masks(model).items())
    # trained on without masks since, the noted ones no longer hold
    to_peft(model, tmp_path / "q")
    from safetensors import safe_open

    with safe_open(tmp_path / "q" / WEIGHTS, framework="pt") as file:
        header = file.metadata()
    full = {name: tensor + (tensor == 0).to(tensor.dtype) for name, tensor in tensors.items()}
    save_file(full, tmp_path / "q" / WEIGHTS, metadata=header)
    again = from_peft_(bert(), tmp_path / "q")
    assert all(mask.all() for mask in masks(again).values())


@every_family
@pytest.mark.parametrize("pattern", ["entry", "unit"])
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
def test_peft_computes_the_same_from_our_files(family, pattern, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(FAMILIES[family](), pattern=pattern, targets="all-linear")
    to_peft(model, tmp_path / "p")
    theirs = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "p").eval()
    torch.testing.assert_close(logits_of(theirs, model), logits(model), rtol=1e-5, atol=1e-6)


@every_family
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
def test_we_compute_the_same_from_pefts_files(family, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    base = FAMILIES[family]()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules="all-linear",
        init_lora_weights=False,
        modules_to_save=["classifier"] if family == "bert" else None,
        rank_pattern={"layers.1.mlp.up_proj": 2} if family == "llama" else {},
        alpha_pattern={"layers.1.mlp.up_proj": 5} if family == "llama" else {},
        fan_in_fan_out=family == "gpt2",
    )
    theirs = peft.get_peft_model(base, config).eval()
    if family == "bert":
        with torch.no_grad():
            theirs.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    theirs.save_pretrained(str(tmp_path / "p"))
    ours = from_peft_(FAMILIES[family](), tmp_path / "p")
    torch.testing.assert_close(logits(ours), logits_of(theirs, ours), rtol=1e-5, atol=1e-6)
    assert all(mask.all() for mask in masks(ours).values())


def logits_of(theirs, like):
    with torch.no_grad():
        return theirs(**batch(like, 5)).logits


def test_names_that_end_alike_stay_apart(tmp_path):
    from torch import nn

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    model = build()
    adapt_(model, SparseAdapter(kind="lora", score="random", targets=r"0", rank=2))
    # "0" ends "1.0" too, and a regular expression in a lone string takes both
    assert sorted(installed.parts(model, "default")) == ["0", "1.0"]
    model = build()
    adapt_(model, SparseAdapter(kind="lora", score="random", targets=r"[0]", rank=2))
    to_peft(model, tmp_path / "p")
    assert json.loads((tmp_path / "p" / CONFIG).read_text())["target_modules"] == "(?:0)"


def test_only_lora_goes_to_peft(tmp_path):
    model = bert()
    adapt_(model, SparseAdapter(kind="pfeiffer", score="random", width=4))
    with pytest.raises(RequestError, match=r'no format for adapters of kind "pfeiffer"'):
        to_peft(model, tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["scorer"]}, "does not have"),
    ],
)
def test_what_cannot_be_read_is_refused(change, says, tmp_path):
    to_peft(adapted(bert()), tmp_path / "p")
    config = json.loads((tmp_path / "p" / CONFIG).read_text())
    (tmp_path / "p" / CONFIG).write_text(json.dumps({**config, **change}))
    model = bert()
    with pytest.raises(RequestError, match=says):
        from_peft_(model, tmp_path / "p")
    assert installed.names(model) == []


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"holds no adapter_config.json"):
        from_peft_(bert(), tmp_path)
    to_peft(adapted(bert()), tmp_path / "p")
    with pytest.raises(RequestError, match=r"does not have|another base"):
        from_peft_(llama(), tmp_path / "p")
    with pytest.raises(RequestError, match=r"does not have|another base"):
        from_peft_(mlp(), tmp_path / "p")
    raw = (tmp_path / "p" / WEIGHTS).read_bytes()
    (tmp_path / "p" / WEIGHTS).write_bytes(raw[:100])
    with pytest.raises(RunError, match=r"damaged"):
        from_peft_(bert(), tmp_path / "p")
    (tmp_path / "p" / WEIGHTS).unlink()
    with pytest.raises(RequestError, match=r"holds no adapter_model.safetensors"):
        from_peft_(bert(), tmp_path / "p")
    (tmp_path / "p" / CONFIG).write_text("{")
    with pytest.raises(RunError, match=r"damaged"):
        from_peft_(bert(), tmp_path / "p")
