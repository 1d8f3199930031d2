from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from clicks import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.updates.clip import Threshold, clip_, clip_sparse_, factors, norms, released_bound
from sparing.updates.occurrences import count, joined_all
from sparing.updates.scaling import RULES, scale_rule

lists = st.lists(st.integers(0, 11), max_size=60)


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    grad, weight = (torch.randn(12, 5, generator=draw) for _ in range(2))
    grad *= torch.rand(12, 1, generator=draw) ** 2 * 20
    grad[3], weight[4], weight[5] = 0, 0, 1e-9
    return grad.to(dtype), weight.to(dtype)


def rows_of(ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    made = torch.sparse_coo_tensor(ids[None], values, (12, 5), check_invariants=True)
    return made.coalesce()


# ---- counts --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(lists, min_size=1, max_size=4), st.lists(st.sampled_from(["rows", "dense", "auto"]))
)
def test_both_forms_count_and_add_up_alike(parts, forms):
    each = [
        count(
            torch.tensor(part, dtype=torch.int64), 12, (forms or ["auto"])[i % max(len(forms), 1)]
        )
        for i, part in enumerate(parts)
    ]
    joined = joined_all(each)
    expected = torch.bincount(torch.tensor(list(chain(*parts)), dtype=torch.int64), minlength=12)
    assert joined.dense().equal(expected)
    ids, counts = joined.sorted()
    assert ids.equal(expected.nonzero()[:, 0])
    assert counts.equal(expected[ids])
    assert all(part.dense().sum() == len(ids) for part, ids in zip(each, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_integer_type_and_shape_are_counted(dtype):
    ids = torch.tensor([[[3, 3], [0, 11]]], dtype=dtype)
    for form in ("rows", "dense"):
        found = count(ids, 12, form).sorted()
        assert [part.tolist() for part in found] == [[0, 3, 11], [1, 2, 1]]
        assert all(part.dtype == torch.int64 for part in found)


# ---- the clip ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    ids=lists,
    seed=st.integers(0, 50),
    ratio=st.sampled_from([0.0, 0.01, 0.5, 1.0, math.inf]),
    bound=st.sampled_from([0.0, 1e-5, 0.3, math.inf]),
    fixed=st.booleans(),
)
def test_every_form_is_the_plain_rule(ids, seed, ratio, bound, fixed):
    grad, weight = drawn(seed)
    with_inf = math.inf in (ratio, bound)
    threshold = Threshold(ratio=ratio, bound=bound, form="fixed" if fixed else "adaptive")
    expected = (
        grad.double()
        if with_inf and (bound == math.inf or not fixed)
        else reference(grad, weight, ids, ratio=ratio, bound=bound, fixed=fixed)
    )
    occurring = count(torch.tensor(ids, dtype=torch.int64), 12)
    for form in ("rows", "dense"):
        found = grad.clone()
        rows, counts, clipped = clip_(found, weight, occurring, threshold, form)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        changed = (found != grad).any(1)
        where = torch.arange(12) if rows is None else rows
        assert not changed[[i for i in range(12) if i not in ids]].any()
        assert set(changed.nonzero()[:, 0].tolist()) <= set(where[clipped].tolist())
        assert counts.equal(occurring.dense()[where])
    sparse = rows_of(torch.arange(12), grad.clone())
    clip_sparse_(sparse, weight, occurring, threshold)
    torch.testing.assert_close(sparse.to_dense().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_norms_are_wide_whatever_the_storage(dtype):
    grad, weight = drawn(1, dtype)
    ids = [0, 0, 1, 2, 6, 6, 6, 9]
    threshold = Threshold(ratio=0.5, bound=0.1)
    wide = reference(grad, weight, ids, ratio=0.5, bound=0.1).to(dtype)
    results = []
    for form in ("rows", "dense"):
        found = grad.clone()
        clip_(found, weight, count(torch.tensor(ids), 12), threshold, form)
        assert found.dtype == dtype
        torch.testing.assert_close(found, wide)
        results.append(found)
    assert results[0].equal(results[1])
    # 300 ones in half precision: their squares do not add up to more than 2,048 or so there
    assert norms(torch.ones(1, 5000, dtype=torch.float16)).item() == pytest.approx(5000**0.5)
    assert norms(torch.full((1, 4), 300.0, dtype=torch.float16)).item() == 600.0


def test_a_gradient_that_is_not_finite_stays_so():
    grad, weight = drawn(0)
    grad[1, 2], grad[2, 0] = math.nan, math.inf
    for form in ("rows", "dense"):
        found = grad.clone()
        clip_(found, weight, count(torch.tensor([1, 2, 2, 0]), 12), Threshold(), form)
        assert not found[1].isfinite().all()
        assert not found[2].isfinite().all()
        assert found[0].isfinite().all()


def test_per_table_clips_the_norm_of_all_rows_that_occur():
    grad, weight = drawn(2)
    counts = torch.tensor([0, 3, 1, 0, 2] + [0] * 7)
    here = counts > 0
    found = factors(grad, weight, counts, Threshold(per="table", ratio=0.1))
    expected = 0.1 * weight[here].norm() / grad[here].norm()
    torch.testing.assert_close(found[here], expected.expand(3))
    assert found[~here].eq(1).all()
    fixed = factors(grad, weight, counts, Threshold(per="table", form="fixed", bound=0.2))
    torch.testing.assert_close(fixed[1], 0.2 / grad[here].norm())


def test_the_bound_of_the_released_program():
    # r twice, and the bound by coordinate: r = 1, d = 10 makes 3.16 times the option
    assert released_bound(1e-5, 10) == pytest.approx(3.1622776e-5)
    assert released_bound(1e-5, 16, ratio=3.0) == pytest.approx(9 * 4 * 1e-5)


def test_rows_that_occur_without_a_gradient_and_gradients_without_an_occurrence():
    # the released sparse branch knows no counts, no bound and the wrong norm
    _, weight = drawn(0)
    values = torch.full((2, 5), 10.0)
    sparse = rows_of(torch.tensor([1, 8]), values)
    clip_sparse_(sparse, weight, count(torch.tensor([0, 1, 1, 1]), 12), Threshold(ratio=0.5))
    assert sparse.values()[1].equal(values[1])
    assert float(sparse.values()[0].norm()) == pytest.approx(3 * 0.5 * float(weight[1].norm()))


# ---- scaling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "lr", "l2"),
    [
        (1024, 8e-4, 1e-5),
        (4096, 16e-4, 4e-5),
        (8192, 22.6274e-4, 8e-5),
        (65536, 64e-4, 64e-5),
        (131072, 90.5096e-4, 128e-5),
    ],
)
def test_the_published_table_for_criteo(batch, lr, l2):
    found = scale_rule(batch, 1024, warmup=1_000_000, samples=3_000_000)
    assert found.lr == pytest.approx(lr, rel=1e-4)
    assert found.l2 == pytest.approx(l2)
    assert (found.table_lr, found.bound) == (1e-4, 1e-5)
    assert found.coupled_decay == 2 * found.l2
    assert found.warmup_steps == math.ceil(1_000_000 / batch)
    assert found.steps == math.ceil(3_000_000 / batch)


@pytest.mark.parametrize(
    ("batch", "lr", "l2"),
    [(1024, 1e-4, 1e-5), (2048, 1.41e-4, 2e-5), (8192, 2.83e-4, 8e-5), (65536, 8e-4, 64e-5)],
)
def test_the_published_table_for_avazu(batch, lr, l2):
    found = scale_rule(batch, 1024, lr=1e-4)
    assert found.lr == pytest.approx(lr, rel=5e-3)
    assert (found.table_lr, found.l2) == (1e-4, pytest.approx(l2))


def test_the_last_row_for_avazu_departs_from_the_rule():
    found = scale_rule(131072, 1024, lr=1e-4)
    assert (found.lr, found.l2) == (pytest.approx(11.31e-4, rel=1e-3), pytest.approx(128e-5))
    assert found.lr < 16e-4  # as published, with an L2 of 96e-5


def test_the_other_rules():
    given = {"lr": 1.0, "table_lr": 2.0, "l2": 3.0}
    found = {rule: scale_rule(64, 4, rule=rule, **given) for rule in RULES}
    assert {r: (f.lr, f.table_lr, f.l2) for r, f in found.items()} == {
        "cowclip": (4.0, 2.0, 48.0),
        "linear": (16.0, 32.0, 3.0),
        "sqrt": (4.0, 8.0, 12.0),
        "none": (1.0, 2.0, 3.0),
    }
    assert all(scale_rule(7, 7, rule=rule, **given).lr == 1.0 for rule in RULES)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"batch": 8, "base_batch": 1.5}, "base_batch must be a whole number"),
        ({"batch": 8, "rule": "lineal"}, 'did you mean "linear"'),
        ({"batch": 8, "lr": -1.0}, "lr must be at least 0"),
        ({"batch": 8, "lr": math.inf}, "lr must be finite"),
        ({"batch": 8, "samples": 0}, "samples must be at least 1"),
    ],
)
def test_rules_refuse_what_makes_no_sense(wrong, told):
    with pytest.raises(RequestError, match=told):
        scale_rule(**wrong)
