from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from clicks import ROWS, WIDTH, Model, batch, loss_of, reference
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparing
from sparing.core.clock import Clock
from sparing.core.errors import RequestError, RunError
from sparing.core.method import Setup
from sparing.updates import tables
from sparing.updates.cowclip import CowClip

TIGHT = {"ratio": 0.001, "bound": 1e-5}


@pytest.fixture(autouse=True)
def sparse_tensors_are_checked():
    with torch.sparse.check_sparse_tensor_invariants():
        yield


def bound(model, **options):
    method = CowClip(**{**TIGHT, **options})
    method.prepare(model, Setup())
    method.bind(model=model)
    return method


def clipped(model, method, *batches):
    """The table's gradient after the clip, and what it was before it."""
    model.zero_grad()
    for ids, labels in batches:
        (loss_of(model, ids, labels) / len(batches)).backward()
    raw = model.table.weight.grad
    raw = raw.to_dense().clone() if raw.is_sparse else raw.clone()
    method.grads(model.named_parameters(), None)
    grad = model.table.weight.grad
    return (grad.to_dense() if grad.is_sparse else grad).clone(), raw


def expected(model, raw, *batches):
    ids = torch.cat([ids for ids, _ in batches]).flatten().tolist()
    return reference(raw, model.table.weight, ids, **TIGHT)


# ---- what is counted -------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["rows", "dense", "auto"])
def test_a_step_is_the_plain_rule(mode, sparse):
    model = Model(sparse=sparse)
    method = bound(model, mode=mode)
    for seed in range(3):
        found, raw = clipped(model, method, batch(32, seed))
        torch.testing.assert_close(
            found.double(), expected(model, raw, batch(32, seed)), rtol=1e-6, atol=1e-9
        )
        assert not found.equal(raw)
    assert 0 < method.signals()["clipped"] <= 1
    assert model.linear.weight.grad is not None  # and as it was: of one column


def test_counts_of_micro_batches_add_up():
    model = Model()
    method = bound(model)
    parts = [batch(8, seed) for seed in range(3)]
    found, raw = clipped(model, method, *parts)
    torch.testing.assert_close(found.double(), expected(model, raw, *parts), rtol=1e-6, atol=1e-9)


def test_only_what_gets_a_gradient_counts():
    model = Model()
    method = bound(model)
    ids = batch(16, 5)[0]
    model.eval()
    with torch.no_grad():
        model(ids)
    model.train()
    model(ids)  # a forward pass whose loss nobody takes
    with torch.no_grad():
        model(ids)
    found, raw = clipped(model, method, batch(16, 1))
    torch.testing.assert_close(
        found.double(), expected(model, raw, batch(16, 1)), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once(reentrant):
    plain, lean = Model(), Model()
    whole = lean.forward

    def again(ids):
        anchor = torch.zeros((), requires_grad=True)
        return checkpoint(lambda ids, _: whole(ids), ids, anchor, use_reentrant=reentrant)

    lean.forward = again
    results = [clipped(model, bound(model), batch(16, 1))[0] for model in (plain, lean)]
    assert results[0].equal(results[1])


def test_padding_is_not_counted_and_never_clipped():
    model = Model(padding=0)
    method = bound(model)
    ids, labels = batch(16, 1)
    assert (ids == 0).any()
    found, raw = clipped(model, method, (ids, labels))
    some = ids[ids != 0].tolist()
    torch.testing.assert_close(
        found.double(), reference(raw, model.table.weight, some, **TIGHT), rtol=1e-6, atol=1e-9
    )
    assert method.signals()["rows"] == len(set(some))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("shape", ["matrix", "offsets", "last"])
@pytest.mark.parametrize("named", [False, True])
def test_bags_count_each_lookup(mode, shape, named):
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(ROWS, WIDTH, mode=mode, include_last_offset=shape == "last")
    method = bound(bag, bound=1e-6, ratio=1e-6)
    flat = torch.tensor([3, 3, 4, 3, 9, 3])
    given = {
        "matrix": {"input": flat.view(2, 3)},
        "offsets": {"input": flat, "offsets": torch.tensor([0, 2])},
        # none behind the last offset: torch's own gradient is not defined there
        "last": {"input": flat, "offsets": torch.tensor([0, 2, 6])},
    }[shape]
    (bag(**given) if named else bag(*given.values())).square().sum().backward()
    raw = bag.weight.grad.clone()
    method.grads(bag.named_parameters(), None)
    rule = {"ratio": 1e-6, "bound": 1e-6}
    torch.testing.assert_close(
        bag.weight.grad.double(),
        reference(raw, bag.weight, flat.tolist(), **rule),
        rtol=1e-6,
        atol=1e-12,
    )


def test_a_table_that_two_modules_read_counts_for_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Embedding(8, 3), nn.Embedding(8, 3)
            self.two.weight = self.one.weight

    model = Twice()
    method = bound(model)
    (model.one(torch.tensor([1, 2])).sum() + model.two(torch.tensor([[2, 2]])).sum()).backward()
    raw = model.one.weight.grad.clone()
    method.grads(model.named_parameters(), None)
    torch.testing.assert_close(
        model.one.weight.grad.double(), reference(raw, model.one.weight, [1, 2, 2, 2], **TIGHT),
        rtol=1e-6, atol=1e-9,
    )  # fmt: skip


def test_linear_terms_by_option():
    model = Model()
    method = bound(model, linear=True)
    clipped(model, method, batch(16, 1))
    assert [table.name for table in method.tables] == ["table", "linear"]
    assert [table.name for table in bound(Model()).tables] == ["table"]


def test_l2_is_added_before_the_clip_over_the_whole_table():
    model = Model()
    method = bound(model, l2=0.05)
    found, raw = clipped(model, method, batch(4, 1))
    whole = raw + 0.1 * model.table.weight.detach()
    torch.testing.assert_close(
        found.double(), expected(model, whole, batch(4, 1)), rtol=1e-5, atol=1e-8
    )
    absent = [row for row in range(ROWS) if row not in batch(4, 1)[0]]
    assert found[absent].equal(whole[absent])
    assert found[absent].abs().sum() > 0


def test_nothing_of_another_step_is_left():
    model = Model()
    method = bound(model)
    clipped(model, method, batch(32, 0))
    found, raw = clipped(model, method, batch(8, 1))
    torch.testing.assert_close(
        found.double(), expected(model, raw, batch(8, 1)), rtol=1e-6, atol=1e-9
    )


@pytest.mark.slow
def test_a_compiled_model_is_counted():
    model = Model()
    method = bound(model)
    compiled = torch.compile(model)
    ids, labels = batch(16, 1)
    loss_of(compiled, ids, labels).backward()
    raw = model.table.weight.grad.clone()
    method.grads(model.named_parameters(), None)
    torch.testing.assert_close(
        model.table.weight.grad.double(), expected(model, raw, (ids, labels)), rtol=1e-6, atol=1e-9
    )


# ---- signals, account, copies ----------------------------------------------------------------


def test_how_often_it_binds_is_told_by_frequency():
    model = Model()
    method = bound(model, by_frequency=1)
    frequency = torch.zeros(ROWS, dtype=torch.int64)
    seen = torch.zeros(24, dtype=torch.int64)
    for seed in range(4):
        clipped(model, method, batch(16, seed))
        ids = batch(16, seed)[0].flatten()
        frequency += ids.bincount(minlength=ROWS)
        for row in ids.unique().tolist():
            seen[int(frequency[row]).bit_length() - 1] += 1
    page = method.page(model, [], lambda passage: None)["rows_clipped"]
    assert page["present"] == seen.tolist()
    assert page["tables"]["table"]["rows"][0] == int((frequency == 1).sum())
    norms = model.table.weight.norm(dim=1)[frequency == 1]
    assert page["tables"]["table"]["norms"][0] == pytest.approx(float(norms.mean().detach()))
    assert sum(page["clipped"]) == method.state_dict()["total"][1] > 0


def test_row_updates_are_accounted():
    for sparse, optimizer, spent in (
        (False, torch.optim.Adam, ROWS),
        (True, torch.optim.SparseAdam, None),
    ):
        model = Model(sparse=sparse)
        method, ledger = bound(model), sparing.Ledger()
        clipped(model, method, batch(8, 1))
        rows = len(batch(8, 1)[0].unique())
        method.step(Clock(step=1), optimizer([model.table.weight]))
        method.account(ledger)
        assert ledger.spent("row_updates") == (spent or rows)
        assert ledger.dense("row_updates") == ROWS
        assert ledger.spent("bytes") == (spent or rows) * WIDTH * 4


def test_copies_share_nothing():
    model = Model()
    method = bound(model)
    other, copied = copy.deepcopy((model, method))
    clipped(other, copied, batch(16, 1))
    assert method.state_dict()["steps"] == 0
    assert copied.tables[0].weight is other.table.weight
    loss_of(other, *batch(16, 1)).backward()
    assert method.tables[0].lookups.take().counts.numel() == 0
    pickle.loads(pickle.dumps((model, method)))


def test_bound_twice_counts_once():
    model = Model()
    method = bound(model)
    method.bind(model=model)
    found, raw = clipped(model, method, batch(16, 1))
    torch.testing.assert_close(
        found.double(), expected(model, raw, batch(16, 1)), rtol=1e-6, atol=1e-9
    )


# ---- the tables in the optimizer -------------------------------------------------------------


def test_tables_get_a_group_of_their_own():
    model = Model()
    method = CowClip(table_lr=0.5, table_decay=0.0, table_eps=1e-7, table_rule="rowwise-adam")
    groups = method.optimizer(model, [{"params": list(model.named_parameters()), "lr": 0.1}])
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["table.weight"],  # first, as in the model
        ["linear.weight", "out.weight", "out.bias"],
    ]
    assert groups[1] == {"params": groups[1]["params"], "lr": 0.1}
    assert groups[0]["lr"] == groups[0]["fixed_lr"] == 0.5
    assert (groups[0]["eps"], groups[0]["rule"]) == (1e-7, "rowwise-adam")
    behind = [{"params": list(model.named_parameters())[::-1]}]
    assert [name for name, _ in method.optimizer(model, behind)[1]["params"]] == ["table.weight"]
    plain = [{"params": list(model.parameters())}]
    assert len(method.optimizer(model, plain)) == 2
    assert CowClip().optimizer(model, plain) is plain


def test_the_rate_of_tables_stays_out_of_the_schedule():
    ids, labels = batch(32, 0)
    data = torch.utils.data.StackDataset(ids=ids, labels=labels)
    seen = []
    session = sparing.Session(
        Model(),
        [CowClip(table_lr=0.5)],
        data=data,
        batch_size=8,
        epochs=1,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        schedule=lambda done: 0.25,
    )
    for part, context in session:
        losses = nn.functional.binary_cross_entropy_with_logits(
            session.model(part["ids"]), part["labels"], reduction="none"
        )
        session.step(losses, context)
        seen.append([group["lr"] for group in session.optimizer.param_groups])
    assert seen == [[0.5, 0.025]] * 4


@pytest.mark.parametrize("mode", ["rows", "dense"])
def test_gradients_find_their_weights_wherever_tables_stand_in_the_model(mode):
    # the released program pairs gradients with weights by position, tables first
    model = Model()
    behind = copy.deepcopy(model)
    behind._modules = dict(reversed(behind._modules.items()))
    found = []
    for each in (model, behind):
        method = bound(each, mode=mode)
        optimizer = torch.optim.SGD(each.parameters(), lr=1.0)
        loss_of(each, *batch(16)).backward()
        method.grads(each.named_parameters(), None)
        optimizer.step()
        found.append(each.state_dict())
    assert next(iter(found[1])) == "out.weight"
    assert all(found[1][name].equal(value) for name, value in found[0].items())


# ---- what is refused -------------------------------------------------------------------------


def test_weights_that_are_read_past_their_module():
    model = Model()
    method = bound(model)
    nn.functional.embedding(batch(4)[0], model.table.weight).sum().backward()
    with pytest.raises(RunError, match=r"table table has a gradient, and its module was never"):
        method.grads(model.named_parameters(), None)


def test_tables_without_values_are_refused():
    with pytest.raises(RequestError, match="table table is on the meta device"):
        CowClip().bind(model=Model().to("meta"))


def test_tables_that_cannot_be_clipped():
    tied = nn.ModuleDict({"in": nn.Embedding(8, 4), "out": nn.Linear(4, 8, bias=False)})
    tied["out"].weight = tied["in"].weight
    with pytest.raises(RequestError, match="weight of table in is that of out too"):
        tables.find(tied)
    with pytest.raises(RequestError, match="scale_grad_by_freq"):
        tables.find(nn.Embedding(8, 4, scale_grad_by_freq=True))
    with pytest.raises(RequestError, match=r"has no trained nn\.Embedding"):
        tables.find(nn.Linear(2, 2), [])
    with pytest.raises(RequestError, match="of more than one column"):
        tables.find(nn.Embedding(8, 1))
    with pytest.raises(RequestError, match=r'like "tabel".*did you mean "table"'):
        tables.find(Model(), ["tabel"])
    with pytest.raises(RequestError, match="knows no model"):
        CowClip().grads([], None)
    with pytest.raises(RequestError, match=r"bind needs model="):
        CowClip().bind()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"ratio": -1}, "ratio must be at least 0"),
        ({"bound": float("nan")}, "bound must be"),
        ({"form": "adaptve"}, 'did you mean "adaptive"'),
        ({"mode": "late"}, "unknown mode"),
        ({"table_rule": "adam"}, "unknown table_rule"),
        ({"tables": ()}, "tables must be patterns"),
        ({"l2": 0.1, "gradients": "sparse"}, "l2 has a gradient in every row"),
    ],
)
def test_options_that_make_no_sense(wrong, told):
    with pytest.raises(RequestError, match=told):
        CowClip(**wrong)


def test_l2_with_sparse_gradients_is_refused_late_too():
    model = Model(sparse=True)
    method = bound(model, l2=0.1)
    with pytest.raises(RequestError, match="no place for the gradient of l2"):
        clipped(model, method, batch(4))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.RMSprop, {}),
        (torch.optim.SGD, {"weight_decay": 0.1}),
        (torch.optim.Adagrad, {"weight_decay": 0.1}),
    ],
)
def test_optimizers_that_take_no_sparse_gradients_are_refused_before_training(optimizer, options):
    data = torch.utils.data.StackDataset(ids=batch(8)[0])
    with pytest.raises(RequestError, match=rf"{optimizer.__name__} takes none.*RowWise"):
        sparing.Session(
            Model(sparse=True),
            [CowClip()],
            data=data,
            epochs=1,
            optimizer=lambda groups: optimizer(groups, lr=0.1, **options),
        )
    model = Model()
    with pytest.raises(RequestError, match="takes none"):
        CowClip.direct(model, optimizer(model.parameters(), lr=0.1, **options), gradients="sparse")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_those_that_take_them_do(optimizer):
    model = Model(sparse=True)
    built = optimizer(model.parameters(), lr=0.1)
    method = CowClip.direct(model, built, **TIGHT)
    loss_of(model, *batch(8)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built.step()
    assert method.signals()["rows"] == len(batch(8)[0].unique())


# ---- in a plain loop -------------------------------------------------------------------------


def trained(model, optimizer, steps=3, **known):
    for seed in range(steps):
        optimizer.zero_grad(**known)
        loss_of(model, *batch(16, seed)).backward()
        optimizer.step()
    return model


def by_hand(steps=3, clip=None):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(model, *batch(16, seed)).backward()
        weight = model.table.weight
        ids = batch(16, seed)[0].flatten().tolist()
        weight.grad = reference(weight.grad, weight, ids, **TIGHT).float()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def same(a, b):
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_direct_is_the_plain_rule(set_to_none):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = CowClip.direct(model, optimizer, **TIGHT)
    same(trained(model, optimizer, set_to_none=set_to_none), by_hand())
    method.remove()
    assert not model.table._forward_hooks
    before = method.state_dict()["steps"]
    trained(model, optimizer)
    assert method.state_dict()["steps"] == before == 3


def test_the_global_clip_comes_after():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    CowClip.direct(model, optimizer, clip=0.05, **TIGHT)
    same(trained(model, optimizer), by_hand(clip=0.05))


def test_a_global_clip_that_runs_before_is_refused():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    CowClip.direct(model, optimizer, **TIGHT)
    loss_of(model, *batch(16)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    with pytest.raises(RequestError, match="a global clip before CowClip"):
        optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_skipped_step_leaves_no_counts(set_to_none):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    CowClip.direct(model, optimizer, **TIGHT)
    for seed, factor in ((0, 1.0), (7, float("inf")), (1, 1.0), (2, 1.0)):
        optimizer.zero_grad(set_to_none=set_to_none)
        scaler.scale(loss_of(model, *batch(16, seed)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    same(model, by_hand())


def test_gradients_that_are_unscaled_within_the_step_are_refused():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    CowClip.direct(model, optimizer, **TIGHT)
    scaler.scale(loss_of(model, *batch(16))).backward()
    with pytest.raises(RequestError, match=r"call scaler\.unscale_\(optimizer\) before"):
        scaler.step(optimizer)


def test_direct_says_what_it_cannot_do():
    model = Model()
    with pytest.raises(RequestError, match="belong to the optimizer, which is built already"):
        CowClip.direct(model, torch.optim.SGD(model.parameters(), lr=1.0), table_lr=0.1)
    with pytest.raises(RequestError, match="does not have the weights of table"):
        CowClip.direct(model, torch.optim.SGD(Model().parameters(), lr=1.0))


# ---- what Adam makes of a penalty on rows that do not occur -----------------------------------


@pytest.mark.parametrize(("eps", "norm"), [(1e-8, 8.1e-3), (1e-7, 1.43e-2)])
def test_absent_rows_shrink_by_adam_whatever_the_penalty(eps, norm):
    # published behaviour, which the epsilon decides: Keras's is 1e-7, torch's 1e-8
    model = nn.Embedding(4, 10).double()
    with torch.no_grad():
        model.weight.fill_(1e-2)
    method = CowClip(l2=1e-5)
    method.bind(model=model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, eps=eps)
    for _ in range(100):
        optimizer.zero_grad()
        (model(torch.tensor([0])).sum() * 0).backward()
        method.grads(model.named_parameters(), None)
        optimizer.step()
    assert float(model.weight[3].detach().norm()) == pytest.approx(norm, rel=0.05)
