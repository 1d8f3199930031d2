from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.weights.masks import masks, nested, shares

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
keeps = st.floats(0.01, 1.0)
# few different values, so that most borders are ties
tensors = st.lists(
    st.lists(st.integers(-2, 2), min_size=0, max_size=24), min_size=1, max_size=4
).filter(any)


def named(values: list[list[int]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {f"m{i // 2}.w{i}": torch.tensor(v).to(dtype) for i, v in enumerate(values)}


def layer_of(name: str) -> str:
    return name.split(".")[0]


def kept(found: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in found.values())


def plainly(parts: list[list[float]], k: int) -> list[list[bool]]:
    """The reference: sort all, best first, ties by place."""
    places = [(i, j) for i, part in enumerate(parts) for j in range(len(part))]
    best = sorted(places, key=lambda p: (-parts[p[0]][p[1]], places.index(p)))[:k]
    return [[(i, j) in best for j in range(len(part))] for i, part in enumerate(parts)]


# ---- counts and ties ---------------------------------------------------------------------------


@given(tensors, keeps)
def test_a_global_mask_is_the_plain_one(values, keep):
    found = masks(named(values), keep)
    expected = plainly(values, round(keep * sum(map(len, values))))
    assert [mask.tolist() for mask in found.values()] == expected


@given(tensors, keeps)
def test_each_tensor_is_the_plain_one(values, keep):
    found = masks(named(values), keep, scope="tensor")
    expected = [plainly([part], round(keep * len(part)))[0] for part in values]
    assert [mask.tolist() for mask in found.values()] == expected


@given(tensors, keeps)
def test_each_layer_keeps_its_exact_share(values, keep):
    scores = named(values)
    found = masks(scores, keep, scope="layer", layer_of=layer_of)
    same = masks(scores, keep, scope="layer", layer_of={name: layer_of(name) for name in scores})
    for layer in {layer_of(name) for name in scores}:
        inside = {name: mask for name, mask in found.items() if layer_of(name) == layer}
        assert kept(inside) == round(keep * sum(mask.numel() for mask in inside.values()))
    assert all(found[name].equal(same[name]) for name in scores)


@given(tensors, keeps, st.sampled_from(DTYPES), st.integers(0, 3))
def test_counts_are_exact_for_every_dtype_and_with_drawn_ties(values, keep, dtype, seed):
    scores = named(values, dtype)
    total = sum(map(len, values))
    drawn = masks(scores, keep, generator=torch.Generator().manual_seed(seed))
    again = masks(scores, keep, generator=torch.Generator().manual_seed(seed))
    plain = masks(scores, keep)
    assert kept(drawn) == kept(plain) == round(keep * total)
    assert all(drawn[name].equal(again[name]) for name in scores)
    for found in (drawn, plain):
        inside = [s for n in scores for s in scores[n][found[n]].tolist()]
        outside = [s for n in scores for s in scores[n][~found[n]].tolist()]
        assert not inside or not outside or min(inside) >= max(outside)


@given(tensors, keeps, keeps)
def test_a_smaller_share_is_a_part_of_a_larger_one(values, one, other):
    small, large = (masks(named(values), keep) for keep in sorted((one, other)))
    assert all(bool((small[name] <= large[name]).all()) for name in small)


def test_ties_go_by_place_in_the_matrix_however_it_lies_in_memory():
    found = masks({"w": torch.zeros(4, 3).t()}, 0.5)["w"]
    assert found.tolist() == [[True] * 4, [True] * 2 + [False] * 2, [False] * 4]


@given(st.integers(0, 10**6))
def test_a_tensor_of_ties_only_keeps_its_exact_count(count):
    # the trap: `score <= threshold` removes all of a zero matrix, or nothing of one of NaN
    keep = max(count, 1) / 10**6
    found = masks({"lora_B": torch.zeros(24, 16)}, keep)["lora_B"]
    assert int(found.sum()) == round(keep * 384)
    assert found.reshape(-1)[: int(found.sum())].all()


def test_equal_shapes_are_told_apart_by_name():
    # the trap: masks paired with parameters of the same shape, so that both go to the first
    scores = {"down": torch.arange(9.0).reshape(3, 3), "up": torch.arange(9.0, 18).reshape(3, 3)}
    found = masks(scores, 0.5)
    assert int(found["down"].sum()) == 0
    assert int(found["up"].sum()) == 9


def test_keep_is_the_share_that_is_kept():
    # the trap: a "sparsity" that is the share removed in the paper and kept in the code
    assert kept(masks({"w": torch.rand(100)}, 0.2)) == 20


def test_keep_one_keeps_all_and_half_is_rounded_to_even():
    scores = {"w": torch.randn(7, 5, generator=torch.Generator().manual_seed(0))}
    assert bool(masks(scores, 1)["w"].all())
    assert kept(masks({"w": torch.arange(5.0)}, 0.5)) == round(2.5) == 2


def test_drawn_ties_are_spread_over_all_tensors():
    scores = {"a": torch.zeros(400), "b": torch.zeros(400)}
    generator = torch.Generator().manual_seed(1)
    share = sum(int(masks(scores, 0.5, generator=generator)["a"].sum()) for _ in range(50)) / 50
    assert abs(share - 200) < 10  # five standard deviations of the mean
    assert int(masks(scores, 0.5)["a"].sum()) == 400


def test_counts_by_tensor_take_the_place_of_a_share():
    scores = {"a": torch.arange(6.0), "b": torch.arange(10.0)}
    found = masks(scores, {"a": 6, "b": 1})
    assert int(found["a"].sum()) == 6
    assert found["b"].nonzero().tolist() == [[9]]


def test_masks_leave_scores_and_generators_alone():
    scores = {"w": torch.randn(50)}
    before = scores["w"].clone()
    states = torch.get_rng_state(), random.getstate()
    masks(scores, 0.3, generator=torch.Generator().manual_seed(0), within=masks(scores, 0.5))
    assert scores["w"].equal(before)
    assert torch.get_rng_state().equal(states[0])
    assert random.getstate() == states[1]


def test_masks_of_parameters_do_not_require_gradients():
    found = masks({"w": torch.nn.Parameter(torch.randn(3, 4))}, 0.5)["w"]
    assert found.dtype == torch.bool
    assert found.shape == (3, 4)


# ---- schedules ---------------------------------------------------------------------------------


@given(keeps, st.integers(1, 9), st.sampled_from(["exponential", "linear"]))
def test_a_schedule_falls_and_ends_exactly(keep, steps, schedule):
    found = shares(keep, steps, schedule=schedule)
    assert len(found) == steps
    assert found[-1] == keep
    assert all(a >= b for a, b in zip([1.0, *found], [*found, keep], strict=True))


def test_schedules_drop_equal_shares_or_equal_numbers():
    assert shares(0.25, 2) == pytest.approx([0.5, 0.25])
    assert shares(0.25, 3, schedule="linear") == pytest.approx([0.75, 0.5, 0.25])


@given(tensors, keeps, st.integers(1, 5), st.integers(0, 5))
def test_nested_masks_never_resurrect_and_are_exact(values, keep, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = named(values)
    total = sum(map(len, values))

    def score(within: dict[str, Tensor]) -> dict[str, Tensor]:
        # the trap: what was dropped gets the best scores of all
        return {n: torch.rand(m.shape, generator=generator) + 5 * ~m for n, m in within.items()}

    schedule = shares(keep, steps)
    before = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in dense.items()}
    for share, found in zip(schedule, nested(score, dense, schedule), strict=True):
        assert kept(found) == round(share * total)
        assert all(bool((found[name] <= before[name]).all()) for name in found)
        before = found


def test_more_than_is_left_is_refused():
    within = {"w": torch.tensor([True, False, False, False])}
    with pytest.raises(RequestError, match='"w" has too few choices left'):
        masks({"w": torch.ones(4)}, 0.5, within=within)


# ---- patterns ----------------------------------------------------------------------------------


def test_whole_units_go_together_through_a_group():
    down, up = torch.zeros(4, 3), torch.zeros(3, 4)
    down[1] = 1.0
    up[:, 2] = 2.0
    units = {"down": ("bottleneck", 0), "up": ("bottleneck", -1)}
    found = masks({"down": down, "up": up}, 0.5, pattern="unit", units=units)
    assert found["down"].all(1).tolist() == [False, True, True, False]
    assert found["up"].all(0).tolist() == [False, True, True, False]
    assert kept(found) == 12


@given(st.integers(1, 6), st.integers(1, 5), keeps, st.sampled_from(["global", "tensor"]))
def test_units_are_kept_whole_and_their_number_is_exact(rows, columns, keep, scope):
    generator = torch.Generator().manual_seed(rows * 10 + columns)
    scores = {n: torch.rand(rows, columns, generator=generator) for n in ("a", "b")}
    found = masks(scores, keep, pattern="unit", scope=scope)
    units = {name: mask.any(1) for name, mask in found.items()}
    assert all(found[name].equal(units[name][:, None].expand(rows, columns)) for name in scores)
    if scope == "global":
        assert kept(units) == round(keep * 2 * rows)
    else:
        assert all(int(unit.sum()) == round(keep * rows) for unit in units.values())


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), keeps)
def test_blocks_are_kept_whole_and_are_the_best(rows, columns, high, wide, keep):
    generator = torch.Generator().manual_seed(rows + 10 * columns)
    score = torch.rand(rows * high, columns * wide, generator=generator, dtype=torch.float64)
    found = masks({"w": score}, keep, pattern=f"block:{high}x{wide}")["w"]
    blocks = [
        (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
        for i in range(rows)
        for j in range(columns)
    ]
    assert all(bool(found[b].all()) or not bool(found[b].any()) for b in blocks)
    sums = [float(score[b].sum()) for b in blocks]
    best = sorted(range(len(blocks)), key=lambda i: -sums[i])[: round(keep * len(blocks))]
    assert {i for i, b in enumerate(blocks) if bool(found[b].any())} == set(best)


@given(st.integers(1, 4), st.integers(1, 6), st.data(), st.booleans())
def test_n_of_every_m_are_kept(n, groups, data, drawn):
    m = data.draw(st.integers(n, 6))
    score = torch.randint(
        0, 3, (3, groups * m), generator=torch.Generator().manual_seed(groups)
    ).float()
    generator = torch.Generator().manual_seed(0) if drawn else None
    found = masks({"w": score}, n / m, pattern=f"{n}:{m}", generator=generator)["w"]
    for mask, part in zip(found.reshape(-1, m), score.reshape(-1, m), strict=True):
        assert int(mask.sum()) == n
        assert n == m or float(part[mask].min()) >= float(part[~mask].max())
        if not drawn:
            assert mask.tolist() == plainly([part.tolist()], n)[0]


def test_units_and_blocks_shrink_in_steps_too():
    generator = torch.Generator().manual_seed(0)
    dense = {"w": torch.rand(8, 4, generator=generator)}
    for pattern in ("unit", "block:2x2"):
        steps = nested(lambda within: dense, dense, shares(0.25, 3), pattern=pattern)
        assert kept(steps[-1]) == 8
        assert bool((steps[-1]["w"] <= steps[0]["w"]).all())


# ---- wrong requests ----------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_broken_scores_are_refused_by_name(broken):
    scores = {"fine": torch.ones(3), "h.0.up": torch.tensor([[0.0, 1.0], [broken, broken]])}
    with pytest.raises(RequestError, match=r'2 of 4 scores of "h.0.up" are not finite.*index 2'):
        masks(scores, 0.5)


@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.0001, math.nan, "half", None, True])
def test_a_share_outside_its_range_is_refused(keep):
    with pytest.raises(RequestError, match="keep must be"):
        masks({"w": torch.ones(3)}, keep)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"scope": "tensors"}, 'unknown scope "tensors"; did you mean "tensor"'),
        ({"scope": "layer"}, "needs layer_of"),
        ({"pattern": "row"}, 'unknown pattern "row"'),
        ({"pattern": "4:2"}, 'unknown pattern "4:2"'),
        ({"pattern": "0:2"}, "unknown pattern"),
        ({"pattern": "block:0x2"}, "unknown pattern"),
        ({"pattern": "block:4x4"}, r'"w" has shape \(6, 4\), which blocks of 4 x 4 do not tile'),
        ({"pattern": "1:2", "keep": 0.4}, "keeps 0.5 of all entries; set keep=0.5"),
        ({"pattern": "1:3", "keep": 1 / 3}, "last axis is not a multiple of 3"),
        ({"pattern": "unit", "units": {}}, 'units says nothing of "w"'),
        ({"pattern": "unit", "units": {"w": ("g", 2)}}, "no axis 2"),
        ({"keep": {"v": 1}}, "no count for w"),
        ({"keep": {"w": 25}}, "cannot keep 25 of the 24"),
        ({"within": {}}, "within has no mask"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(request_, message):
    with pytest.raises(RequestError, match=message):
        masks({"w": torch.ones(6, 4)}, **{"keep": 0.5, **request_})


def test_units_of_a_group_must_agree():
    scores = {"a": torch.ones(3, 2), "b": torch.ones(2, 3)}
    units = {"a": ("g", 0), "b": ("g", 0)}
    with pytest.raises(RequestError, match='"b" has 2 units on axis 0, but "a"'):
        masks(scores, 0.5, pattern="unit", units=units)
    units = {"a": ("g", 0), "b": ("g", 1)}
    with pytest.raises(RequestError, match="a, b share units but lie in layers"):
        masks(scores, 0.5, pattern="unit", units=units, scope="layer", layer_of=lambda name: name)


def test_no_scores_and_an_unknown_schedule_are_refused():
    with pytest.raises(RequestError, match="no scores"):
        masks({}, 0.5)
    with pytest.raises(RequestError, match='unknown schedule "cosine"'):
        shares(0.5, 3, schedule="cosine")
    with pytest.raises(RequestError, match="steps must be at least 1"):
        shares(0.5, 0)
