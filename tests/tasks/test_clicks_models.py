"""Click models against their formulas, written out row by row in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparing.core.errors import RequestError
from sparing.core.flops import count
from sparing.tasks.clicks.interactions import pairs
from sparing.tasks.clicks.models import KINDS, ClickModel, Shape
from sparing.tasks.clicks.tables import Tables

SIZES = (5, 3, 7)
SMALL = Shape(dim=4, std=0.5, widths=(6, 5), cross_layers=2, rank=3, experts=2, cin_widths=(4, 3))


def made(kind: str, numeric: int = 2, **options) -> ClickModel:
    """A model in float64 whose parameters are all random: none hides behind a zero."""
    model = ClickModel(kind, SIZES, numeric, SMALL, **options).double()
    generator = torch.Generator().manual_seed(10 + len(kind))
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return model


def rows(count: int = 6, numeric: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randint(n, (count,), generator=generator) for n in SIZES], 1)
    return ids, torch.randn(count, numeric, generator=generator, dtype=torch.float64)


# ---- the formulas --------------------------------------------------------------------------------


def vectors_of(model: ClickModel, ids: list[int]) -> list[torch.Tensor]:
    """v_f, each (d,), by field."""
    starts = [0, SIZES[0], SIZES[0] + SIZES[1]]
    return [model.tables.vectors.weight[start + i] for start, i in zip(starts, ids, strict=True)]


def linear(model: ClickModel, ids: list[int], x: torch.Tensor) -> torch.Tensor:
    starts = [0, SIZES[0], SIZES[0] + SIZES[1]]
    weights = [model.tables.linear.weight[s + i, 0] for s, i in zip(starts, ids, strict=True)]
    return sum(weights) + model.numeric_linear.weight[0] @ x


def second_order(v: list[torch.Tensor]) -> torch.Tensor:
    return sum(v[f] @ v[g] for f in range(len(v)) for g in range(f + 1, len(v)))


def deep(model: ClickModel, x0: torch.Tensor) -> torch.Tensor:
    h = x0
    for layer in model.deep.layers:
        if isinstance(layer, nn.Linear):
            h = torch.clamp(layer.weight @ h + layer.bias, min=0)
    return h


def cin(model: ClickModel, v: list[torch.Tensor]) -> torch.Tensor:
    first, last, found = v, v, []
    for mix in model.cin.mixes:
        weight = mix.weight.reshape(-1, len(last), len(first))  # (H', H, F)
        last = [
            sum(
                weight[h, i, j] * last[i] * first[j]
                for i in range(len(last))
                for j in range(len(first))
            )
            for h in range(len(weight))
        ]
        found += [each.sum() for each in last]
    return torch.stack(found)


def cross(model: ClickModel, x0: torch.Tensor) -> torch.Tensor:
    x, net = x0, model.cross
    for i in range(SMALL.cross_layers):
        if model.kind == "dcn":
            x = x0 * (x @ net.weights[i].weight[0]) + net.biases[i] + x
        elif model.kind == "dcnv2":
            x = x0 * (net.layers[i].weight @ x + net.layers[i].bias) + x
        else:
            scores = net.gates[i].weight @ x
            shares = torch.exp(scores) / torch.exp(scores).sum()
            new = x
            for e in range(SMALL.experts):
                part = slice(e * SMALL.rank, (e + 1) * SMALL.rank)
                low = torch.tanh(net.down[i].weight[part] @ x)
                low = torch.tanh(net.inner[i][e].weight @ low)
                new = new + shares[e] * (x0 * (net.up[i].weight[:, part] @ low + net.up[i].bias))
            x = new
    return x


def formula(model: ClickModel, ids: list[int], x: torch.Tensor) -> torch.Tensor:
    kind, found = model.kind, model.bias[0]
    if not kind.startswith("dcn"):
        found = found + linear(model, ids, x)
    if kind == "lr":
        return found
    v = vectors_of(model, ids)
    x0 = torch.cat([*v, x])
    if kind in ("fm", "deepfm"):
        found = found + second_order(v)
    if kind == "fm":
        return found
    ends = [cross(model, x0)] if kind.startswith("dcn") else []
    ends.append(deep(model, x0))
    if kind == "xdeepfm":
        ends.append(cin(model, v))
    return found + model.top.weight[0] @ torch.cat(ends)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_its_formula(kind):
    model = made(kind)
    ids, x = rows()
    wanted = torch.stack([formula(model, row.tolist(), each) for row, each in zip(ids, x)])  # noqa: B905
    assert torch.allclose(model(ids, x), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind):
    model = made(kind)
    ids, x = rows(4)
    names = [name for name, _ in model.named_parameters()]

    def loss(numeric: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        given_ = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, given_, (ids, numeric))

    values = tuple(value.detach().clone().requires_grad_() for value in model.parameters())
    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), *values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numeric", [0, 2])
def test_every_parameter_learns_and_rows_that_do_not_occur_do_not(kind, numeric):
    model = made(kind, numeric)
    ids = torch.tensor([[0, 1, 2], [0, 2, 2]])
    model(ids, rows(2)[1] if numeric else None).sum().backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().sum() > 0, name
    table = model.tables.linear if model.tables.vectors is None else model.tables.vectors
    touched = table.weight.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [0, 6, 7, 10]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(kind):
    model = made(kind).eval()
    ids, x = rows()
    assert torch.allclose(model(ids, x)[2:3], model(ids[2:3], x[2:3]), rtol=1e-10, atol=1e-14)
    assert model(ids[:0], x[:0]).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients_are_the_dense_ones(kind):
    ids, x = rows()
    dense, sparse = made(kind), made(kind, sparse=True)
    for model in (dense, sparse):
        model(ids, x).square().sum().backward()
    for (name, one), (_, two) in zip(
        dense.named_parameters(), sparse.named_parameters(), strict=True
    ):
        assert two.grad.is_sparse == name.startswith("tables.")
        assert torch.allclose(one.grad, two.grad.to_dense(), rtol=1e-10, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_products_of_pairs(batch, fields, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(batch, fields, dim, generator=generator, dtype=torch.float64)
    wanted = [float(second_order(list(each))) if fields > 1 else 0.0 for each in v]
    assert torch.allclose(
        pairs(v), torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


# ---- storage -------------------------------------------------------------------------------------


def test_all_fields_share_one_table_and_one_of_linear_terms():
    model = ClickModel("deepfm", SIZES, 0, SMALL)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    assert [(t.num_embeddings, t.embedding_dim) for t in tables] == [(15, 4), (15, 1)]
    ids = torch.tensor([[0, 0, 0], [4, 2, 6]])
    assert model.tables.places(ids).tolist() == [[0, 5, 8], [4, 7, 14]]
    assert "offsets" not in "".join(model.state_dict())


def test_it_begins_at_the_rate_that_it_is_given():
    model = ClickModel("lr", SIZES, 0, log_odds=math.log(0.02 / 0.98))
    assert torch.allclose(model(rows()[0]).sigmoid(), torch.tensor(0.02))
    drawn = ClickModel("deepfm", (50_000,), 0, Shape(std=0.03)).tables
    assert abs(float(drawn.vectors.weight.detach().std()) - 0.03) < 1e-3
    assert not drawn.linear.weight.any()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 0, 7]], r"row 0 of the batch has id 7 in field 2, whose ids go from 0 to 6"),
        ([[0, 0, 0], [0, -1, 0]], r"row 1 of the batch has id -1 in field 1"),
        ([[0, 0]], r"ids must be \(batch, 3\), one column a field, got \(1, 2\)"),
        ([0, 0, 0], r"got \(3,\)"),
    ],
)
def test_ids_that_do_not_fit(ids, message):
    with pytest.raises(RequestError, match=message):
        made("fm", 0)(torch.tensor(ids))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClickModel("deepmf", SIZES), 'unknown model "deepmf"; did you mean "deepfm"'),
        (lambda: ClickModel("fm", ()), "at least one categorical field"),
        (lambda: ClickModel("fm", (3, 0)), r"sizes\[1\] must be at least 1"),
        (lambda: ClickModel("fm", SIZES, -1), "numeric must be at least 0"),
        (lambda: Tables(SIZES, 0, linear=False), "need vectors"),
        (lambda: Shape(widths=()), "widths must name"),
        (lambda: Shape(dim=0), "dim must be at least 1"),
        (lambda: Shape(dropout=1.5), r"dropout must be in \[0, 1\]"),
        (lambda: made("lr")(rows()[0]), r"numeric must be \(batch, 2\), got None"),
        (lambda: made("lr")(rows()[0], rows()[1][:, :1]), r"got \(6, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(RequestError, match=message):
        make()


# ---- what it costs, and how it leaves -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_its_flops_are_counted(kind):
    model = made(kind)
    ids, x = rows()
    with FlopCounterMode(display=False) as counter:
        model(ids, x).sum().backward()
    if kind in ("lr", "fm"):
        # Products with a vector; torch counts those as well.
        assert counter.get_total_flops() < 200
    found = count(model, lambda: model(ids, x).sum())
    assert found.uncounted == ()
    assert found.total == counter.get_total_flops()


@pytest.mark.parametrize("kind", ["lr", "deepfm", "xdeepfm", "dcn-mix"])
def test_a_model_can_be_exported(kind):
    model = made(kind).eval()
    ids, x = rows()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (ids, x), dynamic_shapes=({0: batch}, {0: batch}))
    again = program.module()
    assert torch.allclose(again(ids, x), model(ids, x), rtol=1e-10, atol=1e-13)
    assert torch.allclose(again(ids[:3], x[:3]), model(ids[:3], x[:3]), rtol=1e-10, atol=1e-13)
