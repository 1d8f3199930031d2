"""The defects found in the released DynMoE code, each with the test that keeps it out of here.

| number | in the released code | test |
|---|---|---|
| 1 | a closed gate never gets a gradient | test_1 here; test_top_any_gradients |
| 2 | replicas diverge: records are summed over the wrong group | test_controller_ranks |
| 3 | checkpointing counts everything twice | test_3 here; test_controller, test_moefy |
| 4 | clock and records are not saved | test_controller: killed and resumed |
| 5 | evaluation is recorded | test_5 here; test_controller: leaves no trace |
| 6 | a default maximum overrides the number of experts | test_6 here |
| 7 | gates are divided in place | test_7 here |
| 8 | one-hot dispatch | test_8 here; test_experts: peak memory |
| 9 | all experts padded to the largest load | test_9 here |
| 10 | building a gate seeds the global generator; forward prints | test_10 here |
| 11 | "random" groups that are contiguous blocks | test_11 here |
| 12 | world collectives inside the gate | test_12 here |
| 13 | the scale is fixed and thresholds saturate | test_13 here; test_top_any: large scales |
| 14 | expert counts that know first choices alone | test_14 here |
| 15 | no statistics of k | test_15 here; test_statistics |

Two more of the same code, of its second gate: weights of a token that depend on the batch, and a
crash where no token of a batch has an expert.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from planted import small_layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparing.experts import calibration
from sparing.experts.experts import Experts
from sparing.experts.layer import ExpertLayer
from sparing.experts.method import RoutedExperts
from sparing.experts.relu import ReLURouter
from sparing.experts.statistics import statistics
from sparing.experts.top_any import TopAny, TopAnyOptions, TopAnyRouter
from sparing.experts.top_k import TopK
from sparing.experts.top_p import TopP


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(method: RoutedExperts, dim: int = 8, width: int = 16) -> ExpertLayer:
    experts = Experts(dim, width, method.slots)
    experts.init_(generator=torch.Generator().manual_seed(0))
    return ExpertLayer(method.router(dim), experts).train()


def router(dim: int = 8, **options: Any) -> TopAnyRouter:
    return TopAnyRouter(dim, TopAnyOptions(**({"calibration": 0} | options))).train()


@pytest.mark.parametrize(
    ("options", "heard"),
    [({"published": True}, False), ({}, True), ({"closed_gates": "mean"}, True)],
)
def test_1_a_threshold_above_all_scores_can_come_down(options, heard):
    layer = small_layer(4, 4, losses={}, **({"calibration": 0} | options)).train()
    with torch.no_grad():
        layer.router.threshold[2] = 1.0
    layer(normal(64, 8)).square().sum().backward()
    grad = layer.router.threshold.grad
    assert grad is not None
    assert grad[[0, 1, 3]].all()
    assert bool(grad[2] != 0) == heard
    assert layer.router.similarity.grad is not None


def test_3_checkpointing_records_and_calibrates_once():
    seen = []
    for on in (False, True):
        layer = small_layer(4, 4, calibration=2).train()
        for seed in range(2):
            x = normal(64, 8, seed=seed).requires_grad_()
            y = checkpoint(layer, x, use_reentrant=False) if on else layer(x)
            y.sum().backward()
        seen.append((layer.record, layer.router, len(layer.pending)))
    (plain, first, waiting), (repeated, second, also) = seen
    assert repeated.tokens == plain.tokens == 128
    assert repeated.load.equal(plain.load)
    assert repeated.k_counts.equal(plain.k_counts)
    assert second.calibrated == first.calibrated == 2
    assert second.threshold.equal(first.threshold)
    assert waiting == also == 2


def test_5_evaluation_is_not_recorded():
    layer = small_layer(4, 4, published=True).train()
    layer(normal(32, 8))
    load = layer.record.load.clone()
    layer.eval()
    with torch.no_grad():
        layer.router.threshold.fill_(1.0)
    layer(normal(32, 8, seed=1))
    assert layer.record.load.equal(load)
    assert layer.record.tokens == 32
    assert statistics(layer)["layer"]["tokens"] == 32


@pytest.mark.parametrize("count", [1, 3, 8])
def test_6_there_are_as_many_experts_as_asked(count):
    for method in (TopK(experts=count, k=1), TopAny(max_experts=count)):
        layer = layer_of(method)
        assert method.slots == count
        assert layer.router.similarity.shape[0] == count
        assert layer.router.active.tolist() == [True] * count
        assert all(weight.shape[0] == count for weight in layer.experts.slots().values())
        layer(normal(200, 8))
        assert layer.record.load.shape == (count,)
        assert int(layer.record.load.count_nonzero()) == count


@pytest.mark.parametrize("published", [True, False])
def test_7_nothing_that_backward_needs_is_changed_in_place(published):
    layer = small_layer(4, 4, published=published).train()
    x = normal(32, 8).requires_grad_()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    layer.router.calibrated.fill_(99)
    versions = [t._version for t in (x, *parameters)]
    y = layer(x)
    total = y.square().sum() + sum(layer.take_losses().values(), torch.zeros(()))
    first = torch.autograd.grad(total, [x, *parameters], retain_graph=True)
    second = torch.autograd.grad(total, [x, *parameters])
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert [t._version for t in (x, *parameters)] == versions


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.size = max([self.size, *sizes])
        return out


@pytest.mark.parametrize("method", [TopAny(max_experts=16), TopK(experts=16, k=2)])
def test_8_no_tensor_is_tokens_by_experts_by_capacity(method):
    tokens, dim, width = 1024, 16, 24
    layer = layer_of(method, dim, width)
    x = normal(tokens, dim).requires_grad_()
    with Largest() as largest:
        layer(x).sum().backward()
    rows = int(layer.record.load.sum())
    assert rows > tokens
    assert largest.size >= tokens * dim
    # what is left: the map, rows of inputs or hidden units, gate and up together, and weights
    weights = 16 * 2 * dim * width
    assert largest.size <= max(tokens * 16, 2 * rows * max(dim, width), weights)
    capacity = int(layer.record.load.max())
    assert largest.size < tokens * 16 * capacity / 10


def test_9_a_skewed_load_costs_its_rows_and_no_padding():
    layer = layer_of(TopK(experts=8, k=1))
    with torch.no_grad():
        layer.router.similarity.mul_(0)
        layer.router.similarity[:, 0] = torch.tensor([9.0, 1, 0, 0, 0, 0, 0, -9])
    x = normal(400, 8)
    x[:, 0] = torch.where(torch.arange(400) < 390, 3.0, -3.0)
    seen = []
    handle = layer.router.register_forward_hook(lambda _m, _x, routing: seen.append(routing))
    layer(x)
    handle.remove()
    (routing,) = seen
    assert routing.counts.tolist() == [390, 0, 0, 0, 0, 0, 0, 10]
    assert int(layer.record.costs[0]) == 400
    with FlopCounterMode(display=False) as counter:
        layer.experts(x, routing, backend="loop").sum().backward()
    assert 0 < counter.get_total_flops() <= 3 * layer.experts.flops(400)
    # padded to the largest load it would be 8 times 390 rows
    assert layer.experts.flops(8 * 390) > 7 * layer.experts.flops(400)


@pytest.mark.parametrize("method", [TopAny(), TopAny(published=True), TopK()])
def test_10_no_seed_is_set_no_number_drawn_and_nothing_printed(method, capfd):
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        before = torch.random.get_rng_state()
        made = method.router(8)
        made.train()(normal(16, 8))
        made.eval()(normal(16, 8))
        assert torch.random.get_rng_state().equal(before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", [TopAny(max_experts=4), TopK(experts=4)])
def test_11_random_starts_differ_by_seed_and_within(method):
    # there are no groups of neurons here: experts are fresh or whole copies; rows are drawn
    first, again, other = (method.router(16, seed).similarity.detach() for seed in (1, 1, 2))
    assert first.equal(again)
    assert (first - other).abs().min() > 0
    assert all((first[a] - first[b]).abs().max() > 0.1 for a in range(4) for b in range(a))


def test_12_routing_asks_no_other_rank(monkeypatch):
    called = []
    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "all_to_all")
    for name in names:
        monkeypatch.setattr(dist, name, lambda *_a, name=name, **_k: called.append(name))
    summed: list[int] = []
    monkeypatch.setattr(calibration, "sum_", lambda tensors: summed.append(len(list(tensors))))
    # calibration, the first training batches, is the one stated meeting of the ranks
    layer = small_layer(4, 4, calibration=2, target_k=2.0).train()
    for seed in range(4):
        layer(normal(16, 8, seed=seed)).sum().backward()
    assert len(summed) == 2
    layer.eval()(normal(16, 8))
    for other in (TopP(target_k=2.0, calibration=2), ReLURouter(start="calibrated", calibration=2)):
        layer = layer_of(other)
        for seed in range(4):
            layer(normal(16, 8, seed=seed)).sum().backward()
    assert len(summed) == 6
    published = small_layer(4, 4, published=True).train()
    published(normal(16, 8)).sum().backward()
    published.eval()(normal(16, 8))
    assert len(summed) == 6
    assert called == []


def test_13_the_scale_is_an_option_with_a_useful_default():
    x = normal(4000, 64)

    def spread(made: TopAnyRouter) -> Tensor:
        return made.scale * made.cosine(x).detach()

    released = torch.sigmoid(spread(router(64, published=True)))
    assert 0.26 < float(released.min()) < float(released.max()) < 0.74
    assert float(spread(router(64)).std()) == pytest.approx(1.0, abs=0.05)
    assert float(spread(router(64, scale=24.0)).std()) == pytest.approx(3.0, abs=0.15)
    # thresholds are cosines, so that any of them is in reach at any scale
    for scale in (1.0, 8.0, 100.0):
        made = router(64, scale=scale, calibration=1, start_k=2.0)
        made(x)
        opened = made.cosine(x) > made.threshold
        assert float(opened.float().sum(1).mean()) == pytest.approx(2.0, abs=0.01)


def test_14_counts_are_of_all_choices():
    made = router(max_experts=6)
    x = normal(300, 8)
    routing = made(x)
    opened = (made.cosine(x) > made.threshold).sum(0)
    first = torch.bincount(made.cosine(x).argmax(1), minlength=6)
    assert int(routing.k.max()) > 3
    assert (routing.counts >= opened).all()
    assert int(routing.counts.sum()) == int(routing.k.sum()) == routing.rows
    assert int(routing.counts.sum()) > 2 * int(first.sum())
    assert routing.counts.equal(torch.bincount(routing.experts, minlength=6))


def test_15_the_distribution_of_k_is_known():
    layer = small_layer(6, 6, published=True).train()
    x = normal(300, 8)
    layer(x)
    cosine = layer.router.cosine(x)
    k = (cosine > 0).sum(1)
    point = statistics(layer)["layer"]
    assert point["k_counts"] == [int((k == count).sum()) for count in range(7)]
    assert point["mean_k"] == pytest.approx(float(k.float().mean()))
    assert point["load"] == (cosine > 0).sum(0).tolist()
    assert point["unserved"] == pytest.approx(float((k == 0).float().mean()))
    assert len({count for count in point["k_counts"] if count}) > 2


@pytest.mark.parametrize("published", [True, False])
def test_a_tokens_weight_does_not_depend_on_others_having_more_experts(published):
    made = router(3, max_experts=3, published=published).eval()
    with torch.no_grad():
        made.similarity.copy_(torch.eye(3))
    nobody, one, two = torch.tensor([[-1.0, -2, -3], [1, -1, -1], [1, 1, -1]])
    for others in ([], [one], [two, one]):
        routing = made(torch.stack([nobody, *others]))
        assert routing.weights[routing.tokens == 0].tolist() == [1.0]


@pytest.mark.parametrize("published", [True, False])
def test_a_batch_without_any_open_gate_trains(published):
    layer = small_layer(4, 4, published=published).train()
    layer.router.calibrated.fill_(99)
    with torch.no_grad():
        layer.router.threshold.fill_(1.0)
    x = normal(20, 8).requires_grad_()
    y = layer(x)
    (y.sum() + sum(layer.take_losses().values(), torch.zeros(()))).backward()
    assert int(layer.record.unserved) == 20
    assert bool(y.any()) == (not published)
    torch.testing.assert_close(layer.record.unserved_sum, x.detach().sum(0))
