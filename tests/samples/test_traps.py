"""Each defect of the released code, and each bad input."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

import sparing
from sparing.core import state
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.samples.scores import ScoreTable

N = 40


def truth(ids):
    """The loss that each sample must get: no other sample has it."""
    return (ids.double() * 0.01 + 0.1).float()


class Batched(TensorDataset):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


def data(n=N):
    return Batched(torch.arange(n).float())


def sampler(**options):
    return sparing.InfoBatch(**{"ratio": 0.5, "size": N, "epochs": 8, "seed": 3, **options})


def train(method, loader, epochs, set_epoch=True):
    """The ids of each epoch."""
    found = []
    for epoch in epochs:
        if set_epoch:
            method.set_epoch(epoch)
        ids = []
        for index, x in loader:
            assert index.tolist() == x.long().tolist()
            method.loss(truth(index).requires_grad_(), index)
            ids += index.tolist()
        found.append(ids)
    return found


class Ahead:
    """Fetches so many batches before it gives the first."""

    def __init__(self, loader, by):
        self.loader, self.by = loader, by

    def __iter__(self):
        waiting = []
        for batch in self.loader:
            waiting.append(batch)
            if len(waiting) > self.by:
                yield waiting.pop(0)
        yield from waiting


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("set_epoch", [False, True])
def test_an_epoch_ends_and_annealing_comes_when_it_is_due(drop_last, set_epoch):
    method = sampler()
    loader = DataLoader(sparing.indexed(data()), sampler=method, batch_size=7, drop_last=drop_last)
    epochs = train(method, loader, range(8), set_epoch)
    kept = method.lengths()
    assert len(kept) == 8
    assert kept[0] == kept[7] == N
    assert all(k < N for k in kept[1:7])
    assert [len(e) for e in epochs] == [k // 7 * 7 if drop_last else k for k in kept]
    assert method.selection.weights is None


def test_len_is_exact_before_an_epoch_and_changes_nothing():
    for set_epoch in (True, False):
        method = sampler()
        loader = DataLoader(sparing.indexed(data()), sampler=method, batch_size=8)
        for epoch in range(8):
            if set_epoch:
                method.set_epoch(epoch)
            lengths = {len(loader) for _ in range(3)}
            batches = 0
            for index, _ in loader:
                assert len(method) == len(method.selection)
                method.loss(truth(index).requires_grad_(), index)
                batches += 1
            assert lengths == {batches}
        assert len(method.lengths()) == 8


@pytest.mark.parametrize("ahead", [1, 2, 8])
def test_look_ahead_writes_to_the_right_rows(ahead):
    method = sampler()
    loader = Ahead(DataLoader(sparing.indexed(data()), sampler=method, batch_size=4), ahead)
    train(method, loader, range(3), set_epoch=False)
    assert method.scores.value.tolist() == truth(torch.arange(N)).tolist()
    assert len(method.lengths()) == 3


def test_looking_at_one_batch_changes_no_plan():
    method = sampler()
    loader = DataLoader(sparing.indexed(data(4)), sampler=method, batch_size=100)
    whole = list(method)
    for _ in range(3):
        assert list(method) == whole
    assert method.lengths() == [N]
    assert loader.batch_size == 100


@pytest.mark.parametrize("kind", ["subset", "concat", "items"])
def test_any_map_style_data_set(kind):
    base = data(2 * N)
    chosen = {
        "subset": lambda: Subset(base, list(range(10, 10 + N))),
        "concat": lambda: ConcatDataset([Subset(base, range(15)), Subset(base, range(15, N))]),
        "items": lambda: [float(i) for i in range(N)],
    }[kind]()
    method = sampler()
    for index, x in DataLoader(sparing.indexed(chosen), sampler=method, batch_size=9):
        value = x[0] if isinstance(x, list) else x
        assert value.long().tolist() == (index + (10 if kind == "subset" else 0)).tolist()


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"x": 1}, {"x": 1, "index": 0}),
        ((1, 2), (0, 1, 2)),
        ([1, 2], [0, 1, 2]),
        (5, (0, 5)),
    ],
)
def test_the_id_joins_a_sample_of_any_kind(sample, expected):
    wrapped = sparing.indexed([sample])
    assert wrapped[0] == wrapped.__getitems__([0])[0] == expected
    if isinstance(sample, dict):
        assert DataLoader(wrapped).__iter__().__next__()["index"].dtype == torch.int64
        with pytest.raises(RequestError, match="have a field"):
            sparing.indexed([{"index": 1}])[0]


def test_data_sets_and_samplers_pickle_and_copy():
    method = sampler()
    wrapped = sparing.indexed(data())
    loader = DataLoader(wrapped, sampler=method, batch_size=8)
    train(method, loader, range(2))
    method.set_epoch(2)
    for clone in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert list(clone) == list(method)
    for clone in (pickle.loads(pickle.dumps(wrapped)), copy.deepcopy(wrapped)):
        assert clone[3][0] == 3


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_by_fork_and_spawn(context):
    method = sampler()
    loader = DataLoader(
        sparing.indexed(data()), sampler=method, batch_size=8, num_workers=2,
        multiprocessing_context=context, generator=torch.Generator(),
    )  # fmt: skip
    train(method, loader, range(2), set_epoch=False)
    assert method.scores.value.tolist() == truth(torch.arange(N)).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ids_stay_whole_whatever_the_dtype_of_the_losses(dtype):
    size = 2**24 + 10
    table = ScoreTable(size)
    ids = torch.tensor([2049, 4099, 2**24 + 1])
    table.update_(ids, torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    assert np.flatnonzero(~np.isnan(table.value)).tolist() == ids.tolist()


def test_a_nan_is_rejected_and_counted_and_poisons_nothing():
    method = sampler(delta=1)
    losses = truth(torch.arange(N))
    losses[3] = float("nan")
    losses[5] = float("inf")
    method.set_epoch(0)
    method.loss(losses.requires_grad_(), torch.arange(N))
    method.set_epoch(1)
    assert method.signals()["rejected"] == 2
    assert len(method) < N
    assert {3, 5} <= set(method)  # unknown ones stay


def test_losses_whose_backward_needs_them_are_not_overwritten():
    method = sampler(delta=1)
    method.scores.update_(torch.arange(N), truth(torch.arange(N)))
    method.set_epoch(1)
    ids = torch.tensor(list(method)[:8])
    x = torch.randn(8, requires_grad=True)
    losses = x.exp()
    kept = losses.detach().clone()
    method.loss(losses, ids).backward()
    assert losses.detach().equal(kept)
    weight = torch.from_numpy(method.selection.weight_of(ids.numpy()))
    torch.testing.assert_close(x.grad, kept * weight / 8)


def test_losses_overwritten_later_do_not_reach_the_scores():
    table = ScoreTable(4)
    losses, ids = torch.ones(2), torch.tensor([1, 2])
    table.update_(ids, losses)
    losses.mul_(9)
    ids.zero_()
    assert np.nan_to_num(table.value).tolist() == [0, 1, 1, 0]


def test_global_generators_are_left_alone():
    def kept():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    before = kept()
    method = sampler()
    method.set_epoch(0)
    method.loss(truth(torch.arange(N)).requires_grad_(), torch.arange(N))
    method.set_epoch(1)
    assert list(method)
    assert kept() == before


def test_seeds_and_epochs_give_different_plans_and_the_same_ones_again():
    plans = [list(sampler(seed=s)) for s in (0, 1, 0)]
    assert plans[0] == plans[2] != plans[1]


def test_resume_in_mid_epoch_holds_the_plan(tmp_path):
    method = sampler()
    loader = DataLoader(sparing.indexed(data()), sampler=method, batch_size=5)
    train(method, loader, range(2))
    method.set_epoch(2)
    plan = list(method)
    for index, _ in list(loader)[:3]:
        method.loss(truth(index).requires_grad_(), index)
    state.save(tmp_path / "state", method.state_dict())
    again = sampler(seed=99)
    again.load_state_dict(state.load(tmp_path / "state"))
    assert again.epoch == 2
    assert len(again) == len(plan) - 15
    again.set_epoch(0)  # a loader that counts from 0 again
    assert list(again) == plan[15:]
    assert again.selection.weights.tolist() == method.selection.weights.tolist()


@pytest.mark.parametrize("before", [1, 2])
def test_resume_on_more_ranks_takes_each_remaining_index_once(before, monkeypatch):
    from sparing.core import ranks

    monkeypatch.setattr(ranks, "world_size", lambda: before)
    method = sampler(shard=True)
    method.set_epoch(0)
    plan = method.selection.index.tolist()
    first = torch.tensor(list(method)[:8])
    method.loss(truth(first).requires_grad_(), first)
    kept = copy.deepcopy(method.state_dict())
    shares = []
    for rank in range(4):
        monkeypatch.setattr(ranks, "world_size", lambda: 4)
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        other = sampler(shard=True)
        other.load_state_dict(copy.deepcopy(kept))
        shares.append(list(other))
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for i in share) == sorted(plan[8 * before :])


def test_a_state_saved_between_epochs_begins_the_next():
    method = sampler()
    loader = DataLoader(sparing.indexed(data()), sampler=method, batch_size=8)
    train(method, loader, range(2), set_epoch=False)
    assert method.epoch == 2
    again = sampler()
    again.load_state_dict(method.state_dict())
    assert again.epoch == 2
    more = train(again, DataLoader(sparing.indexed(data()), sampler=again), range(1), False)
    assert again.lengths() == [*method.lengths(), len(more[0])]


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "ids", "message"),
    [
        (torch.tensor(1.0), torch.tensor([1]), 'reduction="none"'),
        (torch.ones(2, 3), torch.tensor([1, 2]), "reduce over everything but the batch"),
        (torch.ones(3), torch.tensor([1, 2]), "every loss needs the id"),
        (torch.ones(2), torch.tensor([1, N]), f"outside 0 to {N - 1}"),
        (torch.ones(2), torch.tensor([-1, 3]), f"outside 0 to {N - 1}"),
        (torch.ones(2), torch.tensor([3, 3]), "more than once"),
        (torch.ones(2), torch.tensor([1.0, 2.0]), "ids must be int64"),
    ],
)
def test_losses_and_ids_that_do_not_fit(losses, ids, message):
    method = sampler()
    method.set_epoch(0)
    with pytest.raises(RequestError, match=message):
        method.loss(losses, ids)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 1.5, float("nan"), "half"])
def test_ratios_outside_their_range(ratio):
    with pytest.raises(RequestError, match=r"the share that is left out, must be in \[0, 1\)"):
        sparing.InfoBatch(ratio=ratio)


def test_other_bad_input():
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(RequestError, match=r"is iterable.*streaming=False"):
        sparing.indexed(Stream())
    with pytest.raises(RequestError, match="must know how many there are"):
        list(sparing.InfoBatch(size=4))
    assert len(list(sparing.InfoBatch(size=4, delta=1))) == 4
    with pytest.raises(RequestError, match="does not know the data set's length"):
        list(sparing.InfoBatch(epochs=4))
    with pytest.raises(RequestError, match="planned no epoch yet"):
        sampler().loss(torch.ones(1), torch.tensor([0]))
    method = sampler()
    with pytest.raises(RequestError, match=f"had {N} samples and has 7 now"):
        method.bind(size=7)
    method.set_epoch(0)
    with pytest.raises(RequestError, match=f"is of {N} samples, the data set has 7"):
        sparing.InfoBatch(size=7, epochs=2).load_state_dict(method.state_dict())
    grows = [1, 2, 3]
    wrapped = sparing.indexed(grows)
    grows.append(4)
    with pytest.raises(RequestError, match="had 3 samples and has 4 now"):
        wrapped[0]


def test_ids_that_are_not_in_the_plan_are_seen():
    method = sampler(delta=1)
    method.scores.update_(torch.arange(N), truth(torch.arange(N)))
    method.set_epoch(1)
    left = sorted(set(range(N)) - set(method))
    with pytest.raises(RequestError, match="not in the epoch's plan"):
        method.loss(torch.ones(1), torch.tensor(left[:1]))


# ---- account, scalars, steps --------------------------------------------------------------------


def test_the_ledger_holds_what_was_left_out():
    method, ledger = sampler(), Ledger()
    loader = DataLoader(sparing.indexed(data()), sampler=method, batch_size=8)
    for epoch in range(8):
        method.set_epoch(epoch)
        for index, _ in loader:
            method.loss(truth(index).requires_grad_(), index)
            ledger.add("samples", spent=len(index))  # as a host does
            ledger.add("flops", spent=1000 * len(index))
            method.account(ledger)
    assert ledger.spent("samples") == sum(method.lengths())
    assert ledger.dense("samples") == 8 * N
    assert abs(ledger.dense("flops") - 8 * N * 1000) < 8


def test_scores_from_batch_losses_tell_hard_from_easy_in_time():
    torch.manual_seed(0)
    method = sampler(delta=1, ratio=0)
    for epoch in range(30):
        method.set_epoch(epoch)
        for index, _ in DataLoader(sparing.indexed(data()), sampler=method, batch_size=4):
            method.batch_loss((index >= N // 2).float().mean().requires_grad_(), index)
    value = method.scores.value
    assert value[N // 2 :].mean() > value[: N // 2].mean() + 0.1


def test_steps_are_bounded_then_estimated_then_exact():
    method = sampler()
    before = method.total_steps(8)
    assert before.expected is None
    loader = DataLoader(sparing.indexed(data()), sampler=method, batch_size=8)
    train(method, loader, range(1))
    first = method.total_steps(8)
    train(method, loader, range(1, 8))
    done = method.total_steps(8)
    steps = sum(-(-length // 8) for length in method.lengths())
    assert done.exact
    assert done.least == steps
    assert before.least <= first.least <= steps <= first.most <= before.most
    assert abs(first.expected - steps) <= 6
    assert sparing.RandomSamples(size=N, epochs=3).total_steps(8, accumulate=2).exact


def test_torch_schedules_end_where_they_should():
    method = sampler()
    loader = DataLoader(sparing.indexed(data()), sampler=method, batch_size=4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    total = 8 * len(loader)
    one = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total)
    schedule = sparing.follow(one, method, total)
    rates = []
    for epoch in range(8):
        method.set_epoch(epoch)
        for index, _ in loader:
            rates.append(schedule.get_last_lr()[0])
            method.loss(truth(index).requires_grad_(), index)
            optimizer.step()
            schedule.step()
    assert len(rates) < total
    assert max(rates) == pytest.approx(1.0, abs=0.05)
    assert schedule.get_last_lr()[0] == pytest.approx(1 / 25 / 1e4)
    assert method.progress == 1.0
