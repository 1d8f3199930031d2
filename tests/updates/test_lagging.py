from __future__ import annotations

import copy
import pickle

import pytest
import torch
from clicks import ROWS, Model, batch, loss_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparing
from sparing.core.errors import RequestError
from sparing.updates.cowclip import CowClip
from sparing.updates.lagging import catch_up_
from sparing.updates.rowwise import RowWise

DECAY = 0.3


def pair(rule="rowwise-adamw", dtype=torch.float64, sparse=True):
    """The same table and optimizer twice: a pass over the table in every step, and lazily."""
    made = []
    for lazy in (False, True):
        model = Model(sparse=sparse).to(dtype)
        tables = {"params": [model.table.weight, model.linear.weight], "rule": rule, "lazy": lazy}
        rest = {"params": model.out.parameters(), "weight_decay": 0.0}
        optimizer = RowWise([{**tables, "weight_decay": DECAY}, rest], lr=0.05)
        if lazy:
            optimizer.follow_(model)
        made.append((model, optimizer))
    return made


def train(model, optimizer, start, steps, rate=lambda step: 0.05):
    for step in range(start, start + steps):
        ids, labels = batch(4, step)
        optimizer.zero_grad()
        loss_of(model, ids, labels.to(model.out.weight.dtype)).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()


def rates(step):
    return 0.02 * (1 + step % 5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rule", ["rowwise-adamw", "rowwise-adagrad"])
def test_lagging_rows_are_those_of_a_pass_in_every_step(rule, sparse):
    (model, optimizer), (late, lazy) = pair(rule, sparse=sparse)
    for done in range(0, 30, 10):
        train(model, optimizer, done, 10, rates)
        train(late, lazy, done, 10, rates)
        state = lazy.state[late.table.weight]
        assert (state["stand"] != state["decayed"]).any()  # some rows do lag
        ids = torch.arange(ROWS).reshape(1, -1)
        with torch.no_grad():
            read = late.table(ids)
        torch.testing.assert_close(read, model.table(ids).detach(), rtol=1e-12, atol=1e-14)
    for name, value in late.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-12, atol=1e-14)
    assert state["stand"].eq(state["decayed"]).all()


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.floats(0, 0.9), st.lists(st.integers(0, 5))), max_size=8),
    st.lists(st.integers(0, 5)),
)
def test_what_rows_owe_is_the_product_of_the_steps_they_missed(steps, last):
    weight = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    plain, stand, total = weight.clone(), torch.zeros(6, dtype=torch.float64), 0.0
    for factor, read in steps:
        plain *= 1 - factor
        total += float(torch.log1p(torch.tensor(-factor, dtype=torch.float64)))
        ids = torch.tensor(read, dtype=torch.int64)
        catch_up_(weight, stand, total, ids)
        torch.testing.assert_close(weight[ids], plain[ids], rtol=1e-12, atol=0)
    catch_up_(weight, stand, total, torch.tensor([*last, *range(6)]))
    torch.testing.assert_close(weight, plain, rtol=1e-12, atol=0)


def test_in_half_precision_a_row_is_rounded_once():
    # a pass rounds each product: 1 - 1e-4 leaves bfloat16 where it is, for ever
    (model, optimizer), (late, lazy) = pair(dtype=torch.bfloat16)
    before = model.table.weight.detach().clone()
    ids, labels = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1).bfloat16()
    for m, o in ((model, optimizer), (late, lazy)):
        for group in o.param_groups:
            group["lr"] = 1e-3 / DECAY
        for _ in range(300):
            o.zero_grad()
            loss_of(m, ids, labels).backward()
            o.step()
    lazy.catch_up_(late.table.weight)
    exact = before.double() * (1 - 1e-3) ** 300
    torch.testing.assert_close(late.table.weight[1:].double(), exact[1:], rtol=2**-8, atol=0)
    assert model.table.weight[1:].equal(before[1:])


def test_saved_between_steps_it_continues_bit_for_bit_in_any_order():
    _, (model, optimizer) = pair()
    train(model, optimizer, 0, 7)
    for first in ("model", "optimizer"):
        both = {"model": model, "optimizer": optimizer}
        states = {name: both[name].state_dict() for name in sorted(both, key=lambda n: n != first)}
        states = copy.deepcopy(states)
        _, (other, again) = pair()
        train(other, again, 0, 2)  # loading replaces what lags
        other.load_state_dict(states["model"])
        again.load_state_dict(states["optimizer"])
        copied, moved = copy.deepcopy((model, optimizer))
        moved.follow_(copied)
        train(other, again, 7, 5)
        train(copied, moved, 7, 5)
        for a, b in zip(other.parameters(), copied.parameters(), strict=True):
            assert a.equal(b)


def test_weights_that_are_loaded_alone_owe_nothing():
    _, (model, optimizer) = pair()
    train(model, optimizer, 0, 5)
    fresh = Model(seed=3).double()
    model.load_state_dict(fresh.state_dict())
    assert model.table.weight.equal(fresh.table.weight)
    model(torch.arange(ROWS - 1).reshape(-1, 3))
    assert model.table.weight.equal(fresh.table.weight)


def test_copies_do_not_hold_the_optimizer():
    _, (model, optimizer) = pair()
    train(model, optimizer, 0, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kept = other.table.weight.detach().clone()
        other(torch.arange(ROWS - 1).reshape(-1, 3))
        assert other.table.weight.equal(kept)
    copied, alone = copy.deepcopy((model, optimizer))
    with pytest.raises(RequestError, match=r"optimizer\.follow_"):
        train(copied, alone, 3, 2)


def test_a_factor_of_nothing_or_less_is_a_pass():
    (model, optimizer), (late, lazy) = pair()
    for m, o in ((model, optimizer), (late, lazy)):
        train(m, o, 0, 3)
        train(m, o, 3, 1, lambda step: 1 / DECAY)
        train(m, o, 4, 3)
        o.state_dict()
    torch.testing.assert_close(model.table.weight, late.table.weight, rtol=1e-12, atol=1e-12)


def test_bags_with_weights_of_their_own_may_read_a_table_twice():
    bag = nn.EmbeddingBag(6, 2, mode="sum", sparse=False).double()
    group = {"params": [bag.weight], "rule": "rowwise-adamw", "weight_decay": 0.1, "lazy": True}
    optimizer = RowWise([group], lr=0.1)
    optimizer.follow_(bag)
    for ids in ([0, 1], [2, 3], [4, 5]):
        each = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
        one = bag(torch.tensor([ids]), per_sample_weights=each)
        two = bag(torch.tensor([[0, 5]]), per_sample_weights=each)
        optimizer.zero_grad()
        (one.sum() + two.sum()).backward()
        optimizer.step()


# ---- as a mode of the clip -------------------------------------------------------------------


def session(mode, steps=6, **options):
    data = torch.utils.data.StackDataset(*batch(64))

    def losses(model, given):
        ids, labels = given
        outputs = model(ids)
        each = nn.functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        return each, outputs

    method = CowClip(
        ratio=0.001,
        mode=mode,
        gradients="sparse",
        linear=True,
        table_rule="rowwise-adamw",
        table_decay=DECAY,
        **options,
    )
    return sparing.Session(
        Model().double(),
        [method],
        data=data_of_doubles(data),
        batch_size=4,
        steps=steps,
        optimizer=lambda groups: RowWise(groups, lr=0.05),
        losses=losses,
        schedule=lambda done: 1 - done / 2,
    )


def data_of_doubles(data):
    return [(ids, label.double()) for ids, label in data]


def run(it, until):
    for of_step, context in it:
        each, outputs = it.forward(of_step)
        it.step(each, context, outputs)
        if it.clock.step == until:
            break


def test_the_mode_lazy_is_the_dense_decay():
    dense, lazy = session("dense"), session("lazy")
    run(dense, 4)
    run(lazy, 4)
    state = lazy._torch_optimizer.state[lazy.unwrapped.table.weight]
    assert (state["stand"] != state["decayed"]).any()
    with lazy.evaluating() as model:
        for (name, a), b in zip(
            model.named_parameters(), dense.unwrapped.parameters(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13, msg=name)
    saved = copy.deepcopy(lazy.state_dict())
    run(lazy, 6)
    again = session("lazy")
    again.load_state_dict(saved)
    run(again, 6)
    assert again.unwrapped.table.weight.equal(lazy.unwrapped.table.weight)
    # rows of a pass over the table are all updated; of the lazy form, those that were read
    spent = [s.ledger.to_dict()["row_updates"]["spent"] for s in (dense, lazy)]
    assert spent[1] < spent[0]


def test_direct_follows_an_optimizer_that_is_lazy():
    (model, optimizer), (late, lazy) = pair()
    for m, o in ((model, optimizer), (late, lazy)):
        CowClip.direct(m, o, ratio=0.001, linear=True)
        train(m, o, 0, 9)
    torch.testing.assert_close(late.state_dict(), model.state_dict(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, 'mode="lazy" needs a table_rule'),
        ({"table_rule": "rowwise-adam"}, 'mode="lazy" needs a table_rule'),
        ({"table_rule": "rowwise-adamw", "l2": 1e-5}, "l2 is coupled to the gradient"),
    ],
)
def test_what_cannot_be_lazy(options, told):
    with pytest.raises(RequestError, match=told):
        CowClip(mode="lazy", **options)


def test_lazy_is_yes_or_no():
    with pytest.raises(RequestError, match="lazy must be true or false"):
        RowWise(nn.Linear(2, 2).parameters(), lazy="yes")
