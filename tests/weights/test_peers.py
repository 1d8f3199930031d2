"""PEFT's own adapters as a method: the same values as PEFT alone, and an honest account."""

from __future__ import annotations

import sys

import pytest
import torch
from models import batch, bert, gpt2, llama, logits, mlp, train_, trained
from torch.utils.flop_counter import FlopCounterMode

from sparing.core import flops
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Setup
from sparing.weights.adapters import SparseAdapter, adapt_
from sparing.weights.peers import Peft
from sparing.weights.peft import from_peft_

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
every_kind = pytest.mark.parametrize("kind", ["lora", "shira"])


def prepared(model, **options):
    method = Peft(**options)
    return method.prepare(model, Setup(seed=3)), method


@every_kind
def test_it_trains_what_it_says(kind):
    base = {name: p.clone() for name, p in bert().named_parameters()}
    model, method = prepared(bert(), kind=kind, r=2)
    assert logits(model).equal(logits(bert()))
    heads = {"classifier.weight", "classifier.bias"}
    values = sum(p.numel() for name, p in trained(model).items() if name not in heads)
    assert values == 2 * 2 * 2 * (16 + 16)  # layers, query and value, r, in + out
    assert heads < set(trained(model))
    train_(model)
    for name, parameter in model.named_parameters():
        before = base.get(name.replace(".base_layer.", "."))
        if before is not None:
            assert before.equal(parameter) == (name not in heads)
    signals = method.signals()
    head = 2 * 16 + 2
    assert signals["adapter_parameters"] == values
    assert signals["trained_parameters"] == values + head
    # two int32 for the place of each value of SHiRA
    assert signals["stored_bytes"] == 4 * (values + head) + (8 * values if kind == "shira" else 0)
    ledger = Ledger()
    method.account(ledger)
    found = ledger.to_dict()["parameters"]
    assert (found["spent"], found["dense"]) == (
        values + head,
        sum(p.numel() for p in base.values()),
    )


@every_kind
def test_peft_alone_computes_the_same(kind):
    ours, _ = prepared(llama(), kind=kind, r=2, alpha=6)
    theirs = llama()
    targets = ["q_proj", "v_proj"]
    torch.manual_seed(3)
    config = (
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets)
        if kind == "lora"
        else peft.ShiraConfig(r=2, random_seed=3, target_modules=targets)
    )
    theirs = peft.get_peft_model(theirs, config)
    train_(ours, 3)
    train_(theirs.base_model.model, 3)
    assert logits(ours).equal(logits(theirs.base_model.model))
    assert not logits(ours).equal(logits(llama()))


@every_kind
@pytest.mark.parametrize("family", [bert, llama])
def test_peft_reads_what_it_exports(kind, family, tmp_path):
    model, method = prepared(family(), kind=kind, r=2)
    train_(model, 3).eval()
    method.export(model, tmp_path / "model")
    theirs = peft.PeftModel.from_pretrained(family(), tmp_path / "model").eval()
    with torch.no_grad():
        assert theirs(**batch(model, 5)).logits.equal(logits(model))
    if kind == "lora":
        torch.testing.assert_close(logits(from_peft_(family(), tmp_path / "model")), logits(model))
    ledger = Ledger()
    method.account(ledger)
    found = ledger.to_dict()["bytes"]
    assert found["spent"] == sum(f.stat().st_size for f in (tmp_path / "model").iterdir())
    assert found["dense"] == sum(p.numel() * 4 for p in family().parameters())


@every_kind
def test_flops_are_those_that_torch_counts(kind):
    model, _ = prepared(bert(), kind=kind, r=2)
    inputs = batch(model)
    counted = flops.count(model, lambda: model(**inputs))
    assert counted.uncounted == ()
    model.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counter = FlopCounterMode(display=False)
        with counter:
            model(**inputs).loss.backward()
    assert counted.total == pytest.approx(counter.get_total_flops(), rel=0.01)
    base = bert()
    whole = flops.count(base, lambda: base(**inputs))
    assert flops.count(model, lambda: model(**inputs), dense=True).total == whole.total


def test_a_half_precision_base_gets_values_in_float32():
    model, _ = prepared(bert().bfloat16(), r=2)
    kinds = {name.split(".")[-1]: p.dtype for name, p in trained(model).items() if "lora" in name}
    assert set(kinds.values()) == {torch.float32}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "dora"}, r'kind of PEFT\'s adapters "dora"'),
        ({"r": 0}, "r must be"),
        ({"dropout": 1}, "dropout must be below 1"),
        ({"kind": "shira", "dropout": 0.1}, "SHiRA has no dropout"),
        ({"targets": 3}, "targets must be names"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options, says):
    with pytest.raises(RequestError, match=says):
        Peft(**options)


def test_models_that_it_cannot_adapt_are_refused():
    with pytest.raises(RequestError, match="PEFT cannot adapt this model"):
        prepared(gpt2(), kind="shira")
    with pytest.raises(RequestError, match="matches none"):
        prepared(bert(), targets=["quarry"])
    with pytest.raises(RequestError, match="beside 0, 2, which is trained as a whole"):
        prepared(mlp(), train_also=["0", "2"])
    model = bert()
    adapt_(model, SparseAdapter(kind="lora", score="random", rank=2))
    with pytest.raises(RequestError, match="delete_ them first"):
        prepared(model)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RequestError, match=r'pip install "sparing\[peft\]"'):
        prepared(bert())
