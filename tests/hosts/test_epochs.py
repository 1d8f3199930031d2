from __future__ import annotations

import copy

import pytest
import torch
from pruning import Prune, Sentences
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from sparing.core.clock import Clock
from sparing.core.errors import RequestError, RunError
from sparing.core.method import Method, Plan
from sparing.hosts.epochs import Epochs, Geometry
from sparing.hosts.following import Following
from sparing.hosts.hooks import HF, LIGHTNING, Hook, check


def epochs(*methods: Method, size: int = 10, total: int = 3, **geometry: int) -> Epochs:
    for method in methods:
        method.bind(size=size, epochs=total)
    made = Epochs(
        list(methods),
        size=size,
        geometry=Geometry(**{"batch_size": 2, **geometry}),
        order=lambda epoch: torch.arange(size).roll(epoch),
        clock=Clock(epochs=total),
    )
    return made


def step(made: Epochs) -> None:
    """One optimizer step of this rank."""
    made.done += made.parts()
    made.tell()
    made.clock.step += 1


# ---- steps of an epoch ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "samples", "micro", "steps"),
    [
        ({"batch_size": 4}, 10, 3, 3),
        ({"batch_size": 4, "drop_last": True}, 10, 2, 2),
        ({"batch_size": 4, "accumulate": 2}, 10, 3, 2),
        ({"batch_size": 4, "accumulate": 4, "world": 2}, 64, 8, 2),
        ({"batch_size": 4, "world": 2}, 9, 1, 1),
        ({"batch_size": 4, "limit": 2}, 100, 2, 2),
        ({"batch_size": 4, "limit": 0.5}, 40, 5, 5),
        ({"batch_size": 4}, 0, 0, 0),
    ],
)
def test_micro_batches_and_steps(geometry, samples, micro, steps):
    found = Geometry(**geometry)
    assert found.micro_batches(samples) == micro
    assert found.steps(micro) == steps


def test_a_plan_is_frozen_until_it_is_done():
    made = epochs(accumulate=2)
    made.begin(10)
    plan = made.plan
    for expected in (2, 2, 1):
        assert made.parts() == expected
        step(made)
        made.begin(10)
        assert made.plan is plan
    assert made.finished
    assert made.clock.place == made.clock.length == 3
    made.end(None)
    assert (made.clock.epoch, made.clock.place, made.plan) == (1, 0, None)
    made.begin(10)
    assert made.plan.index.tolist() == torch.arange(10).roll(1).tolist()


def test_the_clock_tells_epochs_by_their_plans_and_the_bound_is_exact_in_the_end():
    made = epochs(Prune(ratio=0.5), total=3)
    fractions, bounds = [], []
    while made.clock.epoch < 3:
        made.begin(10)
        bounds.append(made.bound())
        while not made.finished:
            fractions.append(made.clock.fraction)
            step(made)
        made.end(None)
    # of 10 equal scores 5 are left out in epoch 1: 3 steps in place of 5
    lengths = [5, 3, 5]
    assert fractions == [(e * n + k) / (3 * n) for e, n in enumerate(lengths) for k in range(n)]
    assert made.clock.fraction == 1
    assert bounds == [15, 13, 13]
    assert made.clock.step == 13


def test_fraction_by_steps_where_there_are_no_epochs():
    assert Clock(step=3, steps=12).fraction == 0.25
    assert Clock(step=3, steps=12, epochs=4).fraction == 0.25
    assert Clock(step=3).fraction == 0
    # a limit of steps that comes before the epochs' end
    assert Clock(step=5, steps=10, epoch=0, epochs=4, place=5, length=8).fraction == 0.5


def test_plans_that_cannot_be_trained_on():
    class Of(Prune.__mro__[1]):  # Method: Prune is final
        name, Options = "of", Prune.Options

        def __init__(self, *index: int) -> None:
            super().__init__()
            self.index = torch.tensor(index, dtype=torch.int64)

        def order(self, clock: Clock) -> Plan:
            return Plan(self.index)

    with pytest.raises(RunError, match=r"had 10 samples .* has 11 now.*attach anew"):
        epochs().begin(11)
    with pytest.raises(RunError, match="has 0 samples for 1 ranks"):
        epochs(Of()).begin(10)
    with pytest.raises(RunError, match="has 1 samples for 2 ranks"):
        epochs(Of(3), world=2).begin(10)
    with pytest.raises(RequestError, match=r"names samples from 0 to 10, .* from 0 to 9"):
        epochs(Of(0, 10)).begin(10)
    with pytest.raises(RequestError, match="names samples from -1 to 2"):
        epochs(Of(2, -1)).begin(10)
    with pytest.raises(RequestError, match="more than one method plans"):
        epochs(Of(0), Of(1)).begin(10)
    with pytest.raises(RequestError, match="no epoch has begun"):
        _ = epochs().total


# ---- another number of ranks ---------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 3), (1, 1)])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_what_remains_of_an_epoch_is_dealt_once_among_other_ranks(before, after, done, monkeypatch):
    size = 24
    data = Sentences(size)
    first = epochs(Prune(), size=size, world=before, accumulate=2)
    first.begin(size)

    def dealt(made: Epochs, rank: int) -> list[list[int]]:
        monkeypatch.setattr("sparing.core.ranks.rank", lambda: rank)
        return [c.index[:, 0].tolist() for _, c in made.batches(data=data)]

    groups = min(done, first.total // 2) * 2
    taken = [i for rank in range(before) for part in dealt(first, rank)[:groups] for i in part]
    first.done += groups
    state = copy.deepcopy(first.state_dict())
    second = epochs(Prune(), size=size, world=after, accumulate=3)
    second.load_state_dict(state)
    second.begin(size)
    rest = [i for rank in range(after) for part in dealt(second, rank) for i in part]
    assert len(set(rest)) == len(rest) == (size - len(taken)) // after * after
    assert set(rest) | set(taken) <= set(range(size))
    assert not set(rest) & set(taken)
    if (size - len(taken)) % after == 0:
        assert set(rest) | set(taken) == set(range(size))
    assert second.clock.place <= second.clock.length
    assert second.clock.place == second.clock.length - second.geometry.steps(second.remaining)
    # and once more, from there
    more = second.parts()
    taken += [i for rank in range(after) for part in dealt(second, rank)[:more] for i in part]
    second.done += more
    third = epochs(Prune(), size=size, world=before)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    again = [i for rank in range(before) for part in dealt(third, rank) for i in part]
    assert len(set(again)) == len(again)
    assert not set(again) & set(taken)


def test_a_state_of_other_data_is_refused():
    made = epochs(size=10)
    with pytest.raises(RequestError, match="with 10 samples, this one has 11"):
        epochs(size=11).load_state_dict(made.state_dict())


# ---- schedules -----------------------------------------------------------------------------------


def follow(build, total: int, lengths: list[int]) -> tuple[list[float], Following]:
    """The rates of all steps of epochs of these lengths, and of none left out."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    at = [0, 1]
    made = Following(build(optimizer), total=total, progress=lambda: (at[0], at[1]))
    found = []
    for epoch, length in enumerate(lengths):
        for place in range(length):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            at[:] = [epoch * length + place + 1, len(lengths) * length]
            made.step()
    return [*found, optimizer.param_groups[0]["lr"]], made


BUILDS = {
    "linear": lambda o: LambdaLR(o, lambda step: 1 - step / 20),
    "one cycle": lambda o: OneCycleLR(o, 1.0, total_steps=21),
    "steps": lambda o: StepLR(o, 6, 0.5),
}


@pytest.mark.parametrize("kind", BUILDS)
def test_schedules_follow_plans(kind):
    plain, _ = follow(BUILDS[kind], 20, [5, 5, 5, 5])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, expected = BUILDS[kind](optimizer), []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert plain[:-1] == expected  # one step further each time while nothing is left out
    short, made = follow(BUILDS[kind], 20, [5, 2, 3, 5])
    assert made.last_epoch == 20
    assert short[-1] == plain[-1]
    assert short[:6] == plain[:6]
    assert set(short) <= set(plain)
    long, made = follow(BUILDS[kind], 20, [5, 9, 9, 5])  # more steps than it was built for
    assert made.last_epoch == 20
    assert long[-1] == plain[-1]


def test_a_followed_schedule_is_saved_loaded_copied_and_asked_like_the_one_inside():
    _, made = follow(BUILDS["linear"], 20, [5, 2])
    state = made.state_dict()
    assert state["last_epoch"] == 20
    _, other = follow(BUILDS["linear"], 20, [1])
    other.load_state_dict({**state, "last_epoch": 7})
    assert other.scheduler.last_epoch == 7
    assert other.get_last_lr() == state["_last_lr"]
    assert isinstance(copy.copy(made), Following)
    with pytest.raises(RequestError, match="a int, which is no torch LRScheduler"):
        Following(3, total=1, progress=lambda: (0, 1))


# ---- what is relied on inside of other libraries -------------------------------------------------


@pytest.mark.parametrize(
    "hook", [*HF, *LIGHTNING], ids=lambda h: f"{h.owner.split(':')[1]}.{h.name}"
)
def test_what_hosts_rely_on_is_there_in_the_installed_versions(hook):
    assert hook.fault() is None, f"{hook.fault()}; a host needs it: {hook.why}"


def test_a_changed_hook_is_told_by_its_name():
    gone = Hook("transformers.trainer:Trainer", "_run_epochs", (), "an epoch's length")
    assert gone.fault() == "Trainer._run_epochs is not there"
    changed = Hook("sparing.core.ranks:agree", "__call__", ("name", "level"), "a test")
    assert "has no parameter" in str(changed.fault())
    moved = Hook("transformers.trainers:Trainer", "log", (), "a test")
    assert "transformers.trainers:Trainer is not there" in str(moved.fault())
    with pytest.raises(
        RequestError,
        match=r"transformers .* changed .* \(an epoch's length\): Trainer\._run_epochs",
    ):
        check((gone,), "transformers")
