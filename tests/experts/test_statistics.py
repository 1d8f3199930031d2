from __future__ import annotations

import json

import torch
from planted import Run, small_layer
from torch import nn

from sparing.experts.controller import ControllerOptions, ExpertController
from sparing.experts.statistics import History, Tally, observe, statistics


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = small_layer(4, 3, seed=0), small_layer(4, 4, seed=1)
        self.first.name, self.second.name = "first", "second"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) + x)


def test_a_snapshot_says_what_training_routed():
    model = TwoLayers().train()
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    model(x)
    found = statistics(model)
    assert list(found) == ["first", "second"]
    first = found["first"]
    routing_load = model.first.record.load.tolist()
    assert first["load"] == routing_load
    assert first["tokens"] == 32
    assert (first["alive"], first["active"]) == (3, [True, True, True, False])
    assert first["mean_k"] == sum(routing_load) / 32
    assert sum(first["k_counts"]) == 32
    assert sum(k * n for k, n in enumerate(first["k_counts"])) == sum(routing_load)
    assert first["domain_load"] is None
    json.dumps(found)


def test_load_is_kept_by_domain():
    model = TwoLayers().train()
    controller = ExpertController(
        [("first", model.first), ("second", model.second)],
        ControllerOptions(statistics_every=2),
    )
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        for layer in (model.first, model.second):
            layer.domain, layer.domains = torch.tensor([0, 2]), 3
        model(torch.randn(2, 16, 8, generator=generator))
        controller.step(step)
    for point in controller.statistics().values():
        by_domain = torch.tensor(point["domain_load"])
        assert by_domain.shape == (3, 4)
        assert by_domain.sum(0).tolist() == point["load"]
        assert by_domain[1].sum() == 0
        assert by_domain[0].sum() > 0
        assert by_domain[2].sum() > 0


def test_history_has_a_point_for_each_period():
    run = Run(start=2, slots=4, adapt=ControllerOptions(every=10, warmup=10, statistics_every=4))
    run.train(22)
    found = run.controller.history.to_dict()
    assert json.loads(json.dumps(found)) == found
    layer = found["layer"]
    assert layer["steps"] == [4, 8, 12, 16, 20]
    assert all(len(values) == 5 for values in layer.values())
    assert layer["tokens"] == [4 * run.size] * 5
    columns = (layer["load"], layer["k_counts"], layer["mean_k"])
    for load, k_counts, mean_k in zip(*columns, strict=True):
        assert sum(load) == sum(k * n for k, n in enumerate(k_counts))
        assert mean_k == sum(load) / (4 * run.size)
    signals = run.controller.signals()
    assert signals["alive"] == [run.alive[-1]]
    assert signals["mean_k"] == layer["mean_k"][-1]
    assert signals["unserved"] == layer["unserved"][-1]
    # what was given out is a copy
    layer["steps"].clear()
    assert run.controller.history.layers["layer"]["steps"] == [4, 8, 12, 16, 20]


def test_unserved_is_counted_before_the_fallback():
    layer = small_layer(4, 4, calibration=0).train()
    with torch.no_grad():
        layer.router.threshold.fill_(1.0)
    layer(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    tally = Tally(4, 8)
    tally.add(layer.record)
    point = tally.point(layer.router.active)
    assert (point["unserved"], point["mean_k"]) == (1.0, 1.0)
    assert layer.record.fallback.equal(layer.record.load)


def test_signals_wait_for_the_first_point():
    controller = ExpertController([("layer", small_layer(4, 3))])
    assert controller.signals() == {"alive": [3], "updates": 0}
    assert controller.statistics() == {}


def test_observing_counts_evaluation_and_leaves_the_record_alone():
    model = TwoLayers().eval()
    x = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    with observe(model) as seen:
        model(x)
        model(x)
    model(x)  # no longer watched
    found = seen.statistics()
    assert found["first"]["tokens"] == 96
    # no token is without an expert in evaluation
    assert found["second"]["k_counts"][0] == 0
    assert found["first"]["load"] == (2 * model.first.router(x.view(-1, 8)).counts).tolist()
    assert int(model.first.record.tokens) == 0
    json.dumps(found)


def test_a_history_is_taken_back():
    history = History(["a"])
    point = Tally(2, 3).point(torch.tensor([True, False]))
    history.append(5, {"a": point})
    other = History(["a"])
    other.load_dict(history.to_dict())
    assert other.to_dict() == history.to_dict()
    assert other.layers["a"]["mean_k"] == [0.0]
