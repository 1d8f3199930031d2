from __future__ import annotations

import pytest
import torch
from torch import nn

from sparing.core import registry
from sparing.core.errors import RequestError
from sparing.run.optim import optimizer, schedule
from sparing.run.recipe import Train


def model() -> nn.Module:
    built = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "block": nn.Linear(4, 4),
            "router": nn.Linear(4, 2, bias=False),
            "norm": nn.LayerNorm(4),
            "lm_head": nn.Linear(4, 5, bias=False),
        }
    )
    experts = nn.Module()
    experts.up = nn.Parameter(torch.ones(3, 4, 4))
    built["experts"] = experts
    return built


def groups_of(train: Train, **shared: object) -> dict[str, dict[str, object]]:
    """Each parameter's settings, by name."""
    built = optimizer(train)([{"params": list(model().named_parameters()), **shared}])
    return {
        name: {key: value for key, value in group.items() if key != "params"}
        for group in built.param_groups
        for name in group["param_names"]
    }


def test_vectors_are_not_decayed():
    found = groups_of(Train(tokens=1, weight_decay=0.2, learning_rate=0.01))
    decay = {name: group["weight_decay"] for name, group in found.items()}
    assert decay == {
        "embed.weight": 0.2, "block.weight": 0.2, "block.bias": 0.0, "router.weight": 0.2,
        "norm.weight": 0.0, "norm.bias": 0.0, "lm_head.weight": 0.2, "experts.up": 0.2,
    }  # fmt: skip
    assert {group["lr"] for group in found.values()} == {0.01}
    assert {group["betas"] for group in found.values()} == {(0.9, 0.95)}


def test_muon_has_the_matrices_that_adamw_has_not():
    train = Train(
        tokens=1,
        optimizer="muon",
        learning_rate=0.01,
        muon_rate=0.3,
        adamw_names=("*embed*", "*head*", "router.*"),
    )
    found = groups_of(train)
    muon = {name for name, group in found.items() if group["rule"] == "muon"}
    assert muon == {"block.weight", "experts.up"}
    assert {name for name, group in found.items() if group["lr"] == 0.3} == muon
    assert {group["rule"] for group in found.values()} == {"muon", "adamw"}
    built = optimizer(train)([{"params": list(model().named_parameters())}])
    assert isinstance(built, registry.optimizer("muon"))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_rates_by_the_first_pattern_that_matches(kind):
    train = Train(
        tokens=1,
        optimizer=kind,
        learning_rate=0.01,
        muon_rate=0.3,
        rates={"*embed*": 0.5, "block.*": 0.6, "block.weight": 0.7},
    )
    found = groups_of(train)
    assert found["embed.weight"]["lr"] == 0.5
    assert found["block.weight"]["lr"] == found["block.bias"]["lr"] == 0.6
    assert found["norm.bias"]["lr"] == 0.01
    assert found["experts.up"]["lr"] == (0.3 if kind == "muon" else 0.01)


def test_what_a_method_set_on_a_group_stays():
    named = list(model().named_parameters())
    built = optimizer(Train(tokens=1, learning_rate=0.01))(
        [{"params": named[:1], "lr": 9.0, "mark": "rows"}, {"params": named[1:]}]
    )
    by_name = {n: group for group in built.param_groups for n in group["param_names"]}
    assert (by_name["embed.weight"]["lr"], by_name["embed.weight"]["mark"]) == (9.0, "rows")
    assert "mark" not in by_name["block.weight"] or by_name["block.weight"]["mark"] != "rows"
    assert sorted(by_name) == sorted(name for name, _ in named)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_moves_every_parameter(kind):
    built = model()
    before = {name: p.detach().clone() for name, p in built.named_parameters()}
    made = optimizer(Train(tokens=1, optimizer=kind))([{"params": list(built.named_parameters())}])
    generator = torch.Generator().manual_seed(0)
    for p in built.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    made.step()
    assert [n for n, p in built.named_parameters() if p.equal(before[n])] == []


def test_muon_refuses_vectors_by_name():
    with pytest.raises(RequestError, match=r'block.bias has shape \(4,\): put it into .*"adamw"'):
        registry.optimizer("muon")([("block.bias", nn.Parameter(torch.ones(4)))])


@pytest.mark.parametrize(
    ("options", "points"),
    [
        (
            {"schedule": "linear", "warmup": 0.2, "final": 0.1},
            {0.1: 0.5, 0.2: 1.0, 0.6: 0.55, 1.0: 0.1},
        ),
        ({"schedule": "cosine", "warmup": 0.0}, {0.0: 1.0, 0.5: 0.5, 1.0: 0.0}),
        ({"schedule": "cosine", "warmup": 0.5, "final": 0.2}, {0.25: 0.5, 0.75: 0.6, 1.0: 0.2}),
        ({"schedule": "constant", "warmup": 0.1}, {0.05: 0.5, 0.1: 1.0, 1.0: 1.0}),
        ({"schedule": "linear", "warmup": 1.0}, {0.5: 0.5, 1.0: 1.0}),
    ],
)
def test_schedules(options, points):
    factor = schedule(Train(tokens=1, **options))
    for done, expected in points.items():
        assert factor(done) == pytest.approx(expected, abs=1e-12)
    assert factor(0.0) > 0, "the first step already moves"
    rising = [factor(step / 100) for step in range(101)]
    peak = rising.index(max(rising))
    assert rising[: peak + 1] == sorted(rising[: peak + 1])
    assert rising[peak:] == sorted(rising[peak:], reverse=True)


def test_sgd_has_momentum_and_looks_ahead():
    found = groups_of(Train(epochs=1, optimizer="sgd", learning_rate=0.2, weight_decay=5e-4))
    assert {group["momentum"] for group in found.values()} == {0.9}
    assert {group["nesterov"] for group in found.values()} == {True}
    assert found["block.weight"]["weight_decay"] == 5e-4
    assert found["block.bias"]["weight_decay"] == 0.0
    plain = groups_of(Train(epochs=1, optimizer="sgd", momentum=0.0))
    assert {(g["momentum"], g["nesterov"]) for g in plain.values()} == {(0.0, False)}
    with pytest.raises(RequestError, match="momentum must be in"):
        Train(epochs=1, momentum=1.0)
