"""Shared experts and the residual block: what acts on every token beside the routed experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routers import normal
from tests.experts.zoo import build, inputs
from torch import Tensor, nn

import sparing
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.experts.always import AlwaysOn
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer, expert_layers
from sparing.experts.losses import LossWeights
from sparing.experts.storage import load, save

PLAIN = {"gated": False, "bias": True, "activation": "relu"}
BESIDE: list[dict[str, Any]] = [
    {"shared": 2, "shared_width": 8},
    {"residual": True, "residual_coefficient": False},
    {"residual": True, "residual_coefficient": True},
    {"shared": 1, "residual": True, "residual_coefficient": True},
]
beside = pytest.mark.parametrize("options", BESIDE, ids=lambda o: "+".join(o))
METHODS = {
    "top-k": (sparing.TopK, {"experts": 3, "k": 3}),
    "top-p": (sparing.TopP, {"experts": 3, "normalize": True}),
    "relu": (sparing.ReLURouter, {"experts": 3, "normalize": True}),
    "top-any": (sparing.TopAny, {"max_experts": 3, "calibration": 0}),
}


def net(width: int, slots: int = 1, seed: int = 0, **kind: Any) -> Experts:
    made = Experts(6, width, slots, **kind)
    made.init_(generator=torch.Generator().manual_seed(seed))
    return made


def layer_of(options: dict[str, Any], dtype: torch.dtype = torch.float64, **kind: Any) -> Any:
    method = sparing.TopK(experts=4, k=2, losses=LossWeights(), **options)
    always = AlwaysOn(
        6,
        shared=net(10, seed=1, **kind) if "shared" in options else None,
        residual=net(14, seed=2, **kind) if "residual" in options else None,
        learned=bool(method.options.residual_coefficient),
    )
    layer = ExpertLayer(method.router(6), net(8, 4, **kind), always=always).to(dtype).train()
    if always.coefficient is not None:
        with torch.no_grad():
            always.coefficient.copy_(normal(2, 6, seed=5))
    return layer


def block(experts: Experts, x: Tensor) -> Tensor:
    """The first expert on all tokens, from the definition."""
    part = {name: value[0] for name, value in experts.slots().items()}
    up = x @ part["up"].t() + part.get("up_bias", 0)
    gated = "gate" in part
    hidden = nn.functional.silu(x @ part["gate"].t()) * up if gated else up.relu()
    return hidden @ part["down"].t() + part.get("down_bias", 0)


def reference(layer: Any, x: Tensor) -> Tensor:
    y = layer.experts.reference(x, layer.router(x))
    always = layer.always
    if always.shared is not None:
        y = y + block(always.shared, x)
    if always.residual is None:
        return y
    kept = block(always.residual, x)
    if always.coefficient is None:
        return y + kept
    share = (x @ always.coefficient.t()).softmax(1)
    return share[:, :1] * y + share[:, 1:] * kept


@beside
@pytest.mark.parametrize("kind", [{}, PLAIN], ids=["gated", "plain"])
def test_outputs_and_gradients_are_those_of_the_definition(options, kind):
    ours, theirs = layer_of(options, **kind), layer_of(options, **kind)
    x = normal(30, 6, dtype=torch.float64)
    upstream = normal(30, 6, seed=3, dtype=torch.float64)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(left), reference(theirs, right)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    (y * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=1e-8)
    for (name, one), (_, two) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-8, msg=name)


def test_shared_experts_are_the_sum_of_as_many():
    """They are computed as one of all their hidden units."""
    both, parts = net(10, seed=4), [net(5, seed=9) for _ in range(2)]
    with torch.no_grad():
        for index, part in enumerate(parts):
            own = slice(5 * index, 5 * index + 5)
            part.up.copy_(both.up[:, own])
            part.gate.copy_(both.gate[:, own])
            part.down.copy_(both.down[..., own])
    x, y = normal(20, 6), torch.zeros(20, 6)
    whole = AlwaysOn(6, shared=both)(x, y)
    torch.testing.assert_close(whole, block(parts[0], x) + block(parts[1], x))


@beside
def test_padding_gives_zero_and_changes_no_other(options):
    layer = layer_of(options)
    x = normal(3, 8, 6, dtype=torch.float64).requires_grad_()
    layer.begin(normal(3, 8, seed=1) > 0)
    mask = layer.mask
    y = layer(x)
    assert not y[~mask].any()
    layer.begin(None)
    torch.testing.assert_close(y[mask], layer(x.detach()[mask]))
    y.sum().backward()
    assert not x.grad[~mask].any()
    assert layer(x[:0]).shape == (0, 8, 6)
    layer.begin(torch.zeros(3, 8, dtype=torch.bool))
    assert not layer(x).any()


@beside
def test_half_precision_and_autocast(options):
    layer = layer_of(options, torch.float32)
    x = normal(30, 6)
    whole = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), whole, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    for part in (layer.experts, layer.always.shared, layer.always.residual):
        if part is not None:
            part.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


FAMILIES = ("llama", "phi3", "gpt2", "bert", "vit")
PAIRS = [("top-k", family) for family in FAMILIES] + [(m, "llama") for m in METHODS if m != "top-k"]


@pytest.mark.parametrize(("method", "family"), PAIRS)
@pytest.mark.parametrize("options", [{"shared": 2}, {"shared": 1, "residual": True}])
def test_beside_copies_the_model_begins_as_the_dense_one(method, family, options):
    model = build(family)
    batch = inputs(model)
    cls, own = METHODS[method]
    with torch.no_grad():
        dense = model(**batch).logits
        sparing.moefy_(model, cls(**own, **options, init="copy"))
        sparse = model(**batch).logits
    assert float((sparse - dense).abs().max()) <= 1e-5 * max(1.0, float(dense.abs().max()))


def test_the_residual_block_beside_silent_experts_is_the_dense_model():
    for family in ("llama", "gpt2"):
        model = build(family)
        batch = inputs(model)
        with torch.no_grad():
            dense = model(**batch).logits
            method = sparing.TopP(experts=4, residual=True, zero_output=True, shared=1)
            sparing.moefy_(model, method)
            torch.testing.assert_close(model(**batch).logits, dense, rtol=0, atol=1e-5)


@beside
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_stands_beside_fresh_experts_trains_and_is_saved(options, family, tmp_path):
    model = sparing.moefy_(build(family), sparing.TopP(experts=4, **options), seed=2).train()
    batch = inputs(model)
    logits = model(**batch).logits
    target = torch.tensor([0, 1]) if "pixel_values" in batch else batch["input_ids"]
    nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten()).backward()
    for layer in expert_layers(model):
        for name, parameter in layer.always.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    before = torch.get_rng_state()
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert torch.equal(before, torch.get_rng_state())
    assert model.state_dict().keys() == loaded.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


STORED: list[tuple[Any, dict[str, Any]]] = [
    (sparing.TopK, {"null_experts": 2, "k": 3}),
    (sparing.TopK, {"null_experts": 2, "null_kind": "constant", "init": "copy", "residual": True}),
    (sparing.TopP, {"null_experts": 2, "null_kind": "copy", "normalize": True, "target_k": 1.5}),
    (sparing.TopP, {"max_k": 2, "losses": {"entropy": 0.1}, "shared": 2, "shared_width": 12}),
    (sparing.ReLURouter, {"start": "calibrated", "coefficient": 0.1, "shared": 1}),
    (sparing.TopAny, {"target_k": 1.5, "shared": 1, "residual": True}),
]


@pytest.mark.parametrize(("cls", "options"), STORED)
def test_all_options_come_back_from_disk_with_their_state(cls, options, tmp_path):
    model = sparing.moefy_(build("llama"), cls(**options)).train()
    batch = inputs(model)
    for step in range(1, 4):
        model(**batch).logits.square().mean().backward()
        sparing.ExpertController(model).step(step)
    save(model.eval(), tmp_path / "m")
    loaded = load(tmp_path / "m")
    one, two = model.state_dict(), loaded.state_dict()
    assert one.keys() == two.keys()
    assert all(value.equal(two[name]) for name, value in one.items())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


@pytest.mark.parametrize(("cls", "options"), STORED)
def test_generation_with_a_cache_is_generation_without(cls, options):
    model = sparing.moefy_(build("llama"), cls(**options)).train()
    ids = inputs(model, rows=2, length=5)["input_ids"]
    model(input_ids=ids)  # calibrates
    model.eval()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cached, plain = (
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            use_cache=use,
            pad_token_id=0,
        )
        for use in (True, False)
    )
    assert cached.shape[1] > 5
    assert cached.equal(plain)


def test_every_token_pays_for_what_is_always_on():
    layer = layer_of({"shared": 1, "residual": True, "residual_coefficient": True})
    layer.begin(torch.tensor([[True] * 7 + [False] * 3]))
    layer(normal(1, 10, 6, dtype=torch.float64))
    each = layer.always.flops(1)
    assert each == 2 * 6 * 3 * (10 + 14) + 2 * 2 * 6
    spent, dense = layer.take_flops()
    router = 3 * 2 * 7 * 6 * 4
    assert spent == 3 * layer.experts.flops(14) + router + 3 * 7 * each
    assert dense == 3 * layer.experts.flops(28) + 3 * 7 * each
    for parameter in layer.always.parameters():
        parameter.requires_grad_(False)
    layer(normal(1, 10, 6, dtype=torch.float64))
    assert layer.take_flops()[1] == 3 * layer.experts.flops(28) + 2 * 7 * each


def test_the_plan_and_the_ledger_know_them():
    plain, rich = (
        sparing.TopK(experts=4, k=2, width=16, **options)
        for options in ({}, {"shared": 2, "shared_width": 8, "residual": True})
    )
    found = []
    for method in (plain, rich):
        model = sparing.moefy_(build("llama"), method)
        method.bind(model=model)
        ledger = Ledger()
        method.account(ledger)
        found.append((method.estimate(100), ledger.spent("active_parameters")))
    # two layers, gated blocks of 2 * 8 and 48 hidden units, width 32
    extra = 2 * 3 * 2 * 100 * 3 * 32 * (16 + 48)
    assert found[1][0][0] - found[0][0][0] == extra
    assert found[1][0][1] - found[0][0][1] == extra
    assert found[1][1] - found[0][1] == 2 * 3 * 32 * (16 + 48)
    assert "shared experts of 16 hidden units and the dense block of 48" in rich.touches()[0]
    assert "beside" not in plain.touches()[0]


def test_fresh_experts_leave_room_for_the_shared_ones():
    def width(**options: Any) -> Any:
        method = sparing.TopK(experts=4, k=2, **options)
        return expert_layers(sparing.moefy_(build("llama"), method))[0]

    assert width().experts.width == 24
    layer = width(shared=1)
    assert (layer.experts.width, layer.always.shared.width) == (16, 16)
    layer = width(shared=2, shared_width=8)
    assert (layer.experts.width, layer.always.shared.width) == (16, 16)
    layer = width(residual=True)
    assert (layer.experts.width, layer.always.residual.width) == (24, 48)
    # two of four choices are null on average: a token takes one true expert
    assert width(null_experts=4).experts.width == 48
    # and experts draw what they drew without
    plain, rich = width(width=16), width(width=16, shared=1, residual=True)
    assert plain.experts.up.equal(rich.experts.up)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": -1}, "shared must be at least 0, got -1"),
        ({"shared_width": 8}, "shared_width is the size of shared experts"),
        ({"shared": 1, "shared_width": 0}, "shared_width must be at least 1"),
        ({"residual_coefficient": True}, "residual_coefficient needs residual=True"),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        sparing.TopAny(**options)


def test_bad_surgery_is_refused_before_anything_changes():
    model = build("llama")
    with pytest.raises(RequestError, match="would double its output"):
        sparing.moefy_(model, sparing.TopK(residual=True), experts="copy")
    with pytest.raises(RequestError, match="would double its output"):
        sparing.moefy_(model, sparing.TopK(init="copy", residual=True, residual_coefficient=False))
    assert not expert_layers(model)
    biased = build("llama", mlp_bias=True)
    nn.init.ones_(biased.model.layers[1].mlp.gate_proj.bias)
    with pytest.raises(RequestError, match=r"has a bias.* without residual"):
        sparing.moefy_(biased, sparing.TopK(residual=True))
    assert not expert_layers(biased)
