"""Mixing in a session and in a plain loop: ticks, worker processes, state, what it looks at."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sparing
from sparing.core import state
from sparing.core.errors import RequestError
from sparing.core.loads import watched

SIZES = {"a": 40, "b": 90, "c": 14}
SOURCE = torch.repeat_interleave(torch.arange(3), torch.tensor(list(SIZES.values())))


class Numbers:
    """Map-style data of one source: x tells the source, y what is to be learnt of it."""

    def __init__(self, source: int, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.size:
            raise IndexError(index)
        x = torch.tensor([float(self.source), index / self.size, 1.0])
        return {"x": x, "y": torch.tensor(3.0 * self.source)}


def data() -> sparing.Sources:
    return sparing.Sources({n: Numbers(i, s) for i, (n, s) in enumerate(SIZES.items())})


def losses(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    return (model(batch["x"]).squeeze(1) - batch["y"]) ** 2, None


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 1)


def session(method: sparing.Mix, **given: Any) -> sparing.Session:
    defaults: dict[str, Any] = {
        "data": data(),
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.01),
        "losses": losses,
        "batch_size": 4,
        "epochs": 2,
        "seed": 3,
    }
    return sparing.Session(model(), [method], **(defaults | given))


def train(whole: sparing.Session, steps: int = 10**6) -> list[int]:
    """The samples that came, in order."""
    came: list[int] = []
    if not steps:
        return came
    for batch, context in whole:
        came += context.index[:, 0].tolist()
        each, outputs = whole.forward(batch)
        step = whole.clock.step
        whole.step(each, context, outputs)
        if whole.clock.step != step:
            steps -= 1
            if not steps:
                break
    return came


REFERENCE = {"a": 0.1, "b": 0.2, "c": 0.3}
MOVING = {"rule": "sheared", "reference": REFERENCE, "every": 5}


def test_static_weights_hold_in_each_epoch():
    whole = session(sparing.Mix(rule="static", weights={"a": 1, "c": 3}))
    came = SOURCE[torch.tensor(train(whole))]
    assert whole.clock.epoch == 2
    for epoch in came.split(144):
        assert torch.bincount(epoch, minlength=3).tolist() == [36, 0, 108]


def test_by_size_each_sample_comes_once_an_epoch_and_share_shortens_it():
    came = train(session(sparing.Mix(rule="size"), epochs=1))
    assert sorted(came) == list(range(144))
    came = train(session(sparing.Mix(rule="uniform", share=0.5), epochs=1))
    assert torch.bincount(SOURCE[torch.tensor(came)]).tolist() == [24, 24, 24]


def test_weights_that_move_count_from_the_next_step_on():
    method = sparing.Mix(**MOVING, seed=1)
    whole = session(method, epochs=1)
    came = SOURCE[torch.tensor(train(whole))]
    history = method.page(whole.unwrapped, [], print)["mixture"]
    assert history["steps"] == [0, 5, 10, 15, 20, 25, 30, 35]
    # source c is learnt worst and rises at once
    assert history["weights"][1][2] > 0.9
    assert (came[:20] == 2).float().mean() < 0.5
    assert (came[20:40] == 2).float().mean() > 0.85
    assert all(loss is not None for loss in history["losses"][1])


def test_the_losses_that_rules_read_are_the_means_of_those_since_the_last_tick():
    method = sparing.Mix(**(MOVING | {"rule": "reference-loss"}))
    whole = session(method, epochs=1)
    seen: list[list[float]] = [[], [], []]
    for number, (batch, context) in enumerate(whole):
        each, outputs = whole.forward(batch)
        for index, loss in zip(context.index[:, 0].tolist(), each.tolist(), strict=True):
            seen[int(SOURCE[index])].append(loss)
        whole.step(each, context, outputs)
        if number == 4:
            break
    expected = torch.tensor([sum(part) / len(part) for part in seen], dtype=torch.float64)
    torch.testing.assert_close(method.losses.latest, expected)
    first = torch.full((3,), 1 / 3).double()
    raised = (first.log() + expected - torch.tensor(list(REFERENCE.values())).double()).softmax(0)
    torch.testing.assert_close(method.weights, (1 - 1e-4) * raised + 1e-4 / 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_new_weights_reach_worker_processes_right_after_what_is_prefetched(workers):
    # the released code reads its weights in the main process, and workers never learn of them
    method = sparing.Mix(
        rule="reference-loss",
        weights=[1, 1e-12, 0],
        reference=[0, 0, 0],
        floor=0.0,
        every=5,
        measure=lambda net: {"losses": [0.0, 1000.0, 0.0]},
    )
    whole = session(method, epochs=1, workers=workers)
    came: list[int] = []
    for batch, context in whole:
        came += context.index[:, 0].tolist()
        assert (batch["x"][:, 0].long() == SOURCE[context.index[:, 0]]).all()
        each, outputs = whole.forward(batch)
        whole.step(each, context, outputs)
    ahead = 2 * workers  # torch asks for two batches for each worker in advance
    assert whole.epochs.ahead == ahead
    sources = SOURCE[torch.tensor(came)]
    border = (5 + ahead) * 4
    assert (sources[:border] == 0).all()
    assert (sources[border:] == 1).all()
    assert came == whole_plan(method)


def whole_plan(method: sparing.Mix) -> list[int]:
    assert method._plan is not None
    return method._plan.tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", [4, 5, 7, 36, 41])
def test_saved_in_mid_epoch_it_continues_bit_for_bit(split, workers, tmp_path):
    if workers and split != 7:
        return
    whole = session(sparing.Mix(**MOVING), workers=workers)
    came = train(whole)
    first = session(sparing.Mix(**MOVING), workers=workers)
    begun = train(first, split)
    state.save(tmp_path / "state", first.state_dict())
    second = session(sparing.Mix(**MOVING), workers=workers)
    second.load_state_dict(state.load(tmp_path / "state"))
    assert begun + train(second) == came
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert one.equal(other)
    assert whole.methods[0].signals() == second.methods[0].signals()


def test_accumulation_ticks_by_optimizer_steps():
    method = sparing.Mix(**MOVING)
    whole = session(method, epochs=1, accumulate=3)
    train(whole)
    assert whole.clock.step == 12
    assert method.page(whole.unwrapped, [], print)["mixture"]["steps"] == [0, 5, 10]


def test_without_a_tick_length_weights_move_between_epochs_only():
    method = sparing.Mix(**(MOVING | {"every": None}))
    whole = session(method)
    came = SOURCE[torch.tensor(train(whole))]
    assert torch.bincount(came[:144]).tolist() == [48, 48, 48]
    assert torch.bincount(came[144:]).tolist() != [48, 48, 48]


# ---- gate loads ----------------------------------------------------------------------------------


class Routed(nn.Module):
    """Two experts: x[0] of 2 goes to the second one, all else to the first."""

    tells_loads = True

    class Routing:
        def __init__(self, counts: Tensor) -> None:
            self.counts = counts

    def forward(self, x: Tensor) -> Any:
        return self.Routing(torch.bincount((x[:, 0] == 2).long(), minlength=2))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.linear, self.passes = Routed(), nn.Linear(3, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.passes += x.shape[0]
        self.gate(x)
        found: Tensor = self.linear(x)
        return found


def gated(method: sparing.Mix, **given: Any) -> sparing.Session:
    defaults: dict[str, Any] = {
        "data": data(),
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.01),
        "losses": losses,
        "batch_size": 4,
        "epochs": 3,
    }
    return sparing.Session(Gated(), [method], **(defaults | given))


def test_gate_loads_are_looked_at_in_evaluation_and_the_anchored_rule_settles():
    method = sparing.Mix(rule="gate-load", every=10, probe_samples=8)
    whole = gated(method)
    train(whole)
    # a and b go to one expert, c to the other: distances sqrt(2), and 0 between a and b
    far = 2**0.5
    signal = torch.tensor([far / 3, far / 3, 2 * far / 3], dtype=torch.float64)
    weights = 0.95 * (10 * signal).softmax(0) + 0.05 / 3
    torch.testing.assert_close(method.weights, weights)
    mixture = method.page(whole.unwrapped, [], print)["mixture"]
    assert mixture["weights"][1] == mixture["weights"][-1]  # constant loads, constant weights
    assert whole.unwrapped.training


def test_the_published_form_drives_weights_to_the_floor():
    method = sparing.Mix(rule="gate-load", form="published", every=1, probe_samples=2, eta=1.0)
    whole = gated(method, epochs=1)
    train(whole)
    torch.testing.assert_close(
        method.weights[0], torch.tensor(0.05 / 3).double(), atol=0.06, rtol=0
    )
    assert method.weights[2] > 0.9


def test_each_look_is_at_other_samples():
    looked: list[Tensor] = []

    def noted(net: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        if not net.training:
            looked.append(batch["x"][:, 1])
        return losses(net, batch)

    method = sparing.Mix(rule="gate-load", every=18, probe_samples=8)
    train(gated(method, epochs=1, losses=noted, dry_run=False))
    looks = [part for part in looked if part.numel() == 8]
    assert len(looks) == 6  # two ticks, three sources
    assert not looks[0].sort().values.equal(looks[3].sort().values)


def test_what_looking_costs_is_in_the_account():
    plain = gated(sparing.Mix(rule="uniform"), epochs=1)
    looking = gated(sparing.Mix(rule="gate-load", every=18, probe_samples=8), epochs=1)
    train(plain)
    train(looking)
    spent, dense = (looking.account().spent("flops"), looking.account().dense("flops"))
    assert dense == plain.account().spent("flops")
    each = dense // 144
    assert spent - dense == 2 * (24 * each // 3)


def test_experts_of_this_library_tell_their_loads():
    layer = nn.Sequential(sparing.TopK(experts=4, k=1).router(8), nn.Identity())
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(10) < 7
    with watched(layer) as found, torch.no_grad():
        layer[0](x, mask)
        layer[0](x, mask)
    assert found[0].shape == (4,)
    assert int(found[0].sum()) == 14  # padding is never routed


def test_a_measure_of_ones_own_stands_in_for_looking():
    calls = []

    def measure(net: nn.Module | None) -> dict[str, Any]:
        calls.append(net)
        return {"loads": torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])}

    method = sparing.Mix(rule="gate-load", every=6, measure=measure)
    whole = session(method, epochs=1)
    train(whole)
    assert len(calls) == 6
    assert calls[0] is whole.unwrapped
    assert float(method.weights[2]) > 0.9


# ---- a plain loop --------------------------------------------------------------------------------


def plain(sampler: sparing.Mix, workers: int = 0, steps: int = 10**6) -> list[int]:
    source, net, came = sparing.indexed(data()), model(), []
    loader = DataLoader(source, sampler=sampler, batch_size=4, num_workers=workers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for number, batch in enumerate(loader):
        if number == steps:
            break
        came += batch["index"].tolist()
        optimizer.zero_grad()
        sampler.loss(losses(net, batch)[0], batch["index"]).backward()
        optimizer.step()
        sampler.tick()
    return came


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_in_a_plain_loop_moves_too(workers):
    sampler = sparing.Mix(sources=data(), **MOVING)
    assert len(sampler) == 144
    came = SOURCE[torch.tensor(plain(sampler, workers))]
    assert came.numel() == 144
    assert (came[:20] == 2).float().mean() < 0.5
    border = 20 + 4 * 2 * workers
    assert (came[border : border + 20] == 2).float().mean() > 0.85
    assert (came[20:border] == 2).float().mean() < 0.5 or not workers
    again = plain(sampler)
    assert sampler._epoch == 1
    assert len(again) == 144


def test_a_sampler_continues_where_its_state_stood():
    whole = plain(sparing.Mix(sources=data(), rule="uniform"))
    first = sparing.Mix(sources=data(), rule="uniform")
    begun = plain(first, steps=9)
    second = sparing.Mix(sources=data(), rule="uniform")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert len(second) == 108
    assert begun + plain(second) == whole


# ---- requests that are wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rule": "gate_load"}, 'unknown mixing rule "gate_load"; did you mean "gate-load"'),
        ({"rule": "static"}, "needs weights"),
        ({"rule": "temperature"}, "needs a temperature"),
        ({"rule": "sheared"}, "needs reference losses"),
        ({"rule": "gate-load", "form": "released"}, "unknown form"),
        ({"share": 0}, "share must be above 0"),
        ({"share": 1.5}, "share must be in"),
        ({"every": 0}, "every must be at least 1"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"weights": "even"}, "weights must be numbers"),
        ({"weights": [1, -1]}, "weights must be at least 0"),
        ({"layers": "first"}, "unknown choice of layers"),
        ({"losses": "test"}, "unknown way to measure losses"),
        ({"wieghts": [1]}, 'did you mean "weights"'),
    ],
)
def test_wrong_options_are_told(options, told):
    with pytest.raises(RequestError, match=told):
        sparing.Mix(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rule": "static", "weights": {"a": 1, "cc": 1}}, 'source "cc".*did you mean "c"'),
        ({"rule": "static", "weights": [1, 2]}, "2 values for the 3 sources a, b, c"),
        ({"rule": "static", "weights": [0, 0, 0]}, "one above 0"),
        ({"rule": "sheared", "reference": {"a": 1.0}}, "no loss for the sources b, c"),
        ({"rule": "gate-load"}, "needs a model with experts"),
    ],
)
def test_options_that_do_not_fit_the_sources_are_told_before_training(options, told):
    with pytest.raises(RequestError, match=told):
        session(sparing.Mix(**options))


def test_data_without_sources_is_told():
    with pytest.raises(RequestError, match="does not know the sources"):
        session(sparing.Mix(), data=Numbers(0, 8))
    with pytest.raises(RequestError, match="does not tell the sources"):
        sparing.Mix(sources=[1, 2, 3])
    kept = sparing.Mix(sources=SOURCE).state_dict()
    fewer = sparing.Mix(sources=SOURCE[:-1])
    with pytest.raises(RequestError, match="resume with the same data"):
        fewer.load_state_dict(kept)


def test_sources_are_told_apart_by_place_whatever_their_names():
    # the released code finds them by patterns such as eval_(.*?)_loss
    names = ["a", "a_loss", "eval_a_loss", "a_gate_load"]
    method = sparing.Mix(
        sources=torch.arange(8) % 4, names=names, rule="static", weights={"a_loss": 1}
    )
    assert method.weights.tolist() == [0, 1, 0, 0]
    with pytest.raises(RequestError, match="same name: a"):
        sparing.Mix(sources=torch.arange(2), names=["a", "a"])


def test_chance_at_equal_cost():
    assert sparing.Mix.at_random({"rule": "gate-load", "every": 7, "share": 0.5}, {}) == {
        "mix": {"rule": "random", "share": 0.5, "every": 7}
    }
    assert sparing.Mix.at_random({"rule": "temperature", "temperature": 2.0}, {}) == {
        "mix": {"rule": "uniform", "share": 1.0, "every": 100}
    }
    assert sparing.Mix.at_random({}, {}) is None
