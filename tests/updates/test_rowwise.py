from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sparing.core import registry
from sparing.core.errors import RequestError
from sparing.updates.rowwise import RowWise

ROWS, WIDTH = 9, 4


@pytest.fixture(autouse=True)
def sparse_tensors_are_checked():
    with torch.sparse.check_sparse_tensor_invariants():
        yield


def table(dtype=torch.float64, sparse=False):
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    return nn.Embedding.from_pretrained(weight.to(dtype), freeze=False, sparse=sparse)


def lookups(step):
    return torch.randint(ROWS - 2, (6,), generator=torch.Generator().manual_seed(step))


def stepped(module, optimizer, start, steps):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        module(lookups(step)).pow(2).sum().mul(0.5 + step).backward()
        optimizer.step()


def plain(rule, steps, lr, eps, decay):
    """A row and a value at a time."""
    rows = table().weight.tolist()
    second, first = [0.0] * ROWS, [[0.0] * WIDTH for _ in range(ROWS)]
    for step in range(steps):
        ids = lookups(step).tolist()
        grads = {i: [2 * (0.5 + step) * ids.count(i) * w for w in rows[i]] for i in ids}
        rows = [[w * (1 - lr * decay) for w in row] for row in rows]
        for i, grad in grads.items():
            square = sum(g * g for g in grad) / WIDTH
            if rule == "rowwise-adagrad":
                second[i] += square
                update = [g / (math.sqrt(second[i]) + eps) for g in grad]
            else:
                second[i] = 0.999 * second[i] + 0.001 * square
                first[i] = [0.9 * m + 0.1 * g for m, g in zip(first[i], grad, strict=True)]
                scale = math.sqrt(second[i] / (1 - 0.999 ** (step + 1))) + eps
                update = [m / (1 - 0.9 ** (step + 1)) / scale for m in first[i]]
            rows[i] = [w - lr * u for w, u in zip(rows[i], update, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("rule", "decay"),
    [
        ("rowwise-adagrad", 0.0),
        ("rowwise-adagrad", 0.3),
        ("rowwise-adam", 0.0),
        ("rowwise-adamw", 0.3),
    ],
)
def test_rows_move_by_the_plain_rule_and_decay_reaches_all(rule, decay, sparse):
    module = table(sparse=sparse)
    optimizer = RowWise(
        [{"params": module.parameters(), "rule": rule}], lr=0.1, eps=1e-7, weight_decay=decay
    )
    stepped(module, optimizer, 0, 5)
    found = module.weight.detach()
    torch.testing.assert_close(found, plain(rule, 5, 0.1, 1e-7, decay), rtol=1e-10, atol=1e-12)
    untouched = table().weight.detach()[-2:] * (1 - 0.1 * decay) ** 5
    torch.testing.assert_close(found[-2:], untouched, rtol=1e-12, atol=0)


def test_the_rest_is_adamw():
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    a = RowWise(ours.parameters(), lr=0.1, weight_decay=0.2, eps=1e-8)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.2)
    for _ in range(3):
        for module, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            module(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["rowwise-adagrad", "rowwise-adamw"])
def test_a_saved_state_continues_bit_for_bit(rule, dtype):
    def build(module):
        groups = [{"params": module.parameters(), "rule": rule}]
        return RowWise(groups, lr=0.1, weight_decay=0.1)

    module = table(dtype, sparse=True)
    optimizer = build(module)
    stepped(module, optimizer, 0, 3)
    other = table(dtype, sparse=True)
    other.load_state_dict(module.state_dict())
    again = build(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = again.state[other.weight]
    assert state["second"].dtype == torch.float32
    assert state["second"].shape == (ROWS,)
    stepped(module, optimizer, 3, 3)
    stepped(other, again, 3, 3)
    assert module.weight.equal(other.weight)


def test_memory_is_as_the_docstring_says():
    for rule, size in (("rowwise-adagrad", 4), ("rowwise-adam", 4 + 4 * WIDTH)):
        module = table(torch.float32)
        optimizer = RowWise([{"params": module.parameters(), "rule": rule}])
        stepped(module, optimizer, 0, 1)
        state = optimizer.state[module.weight]
        held = sum(t.nbytes for name, t in state.items() if name != "step")
        assert held == size * ROWS


def test_what_is_refused():
    assert registry.optimizer("rowwise") is RowWise
    weight = nn.Parameter(torch.zeros(3, 2))
    for group, told in (
        ({"rule": "rowwise-adan"}, 'did you mean "rowwise-adam"'),
        ({"rule": "rowwise-adam", "weight_decay": 0.1}, 'use rule="rowwise-adamw"'),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"params": [nn.Parameter(torch.zeros(3))], "rule": "rowwise-adagrad"}, "rows of tables"),
    ):
        with pytest.raises(RequestError, match=told):
            RowWise([{"params": [weight], **group}])
    module = table(sparse=True)
    module(lookups(0)).sum().backward()
    with pytest.raises(RequestError, match='rule "adamw" takes no sparse gradients'):
        RowWise(module.parameters()).step()
