from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.weights.density import erdos_renyi
from sparing.weights.masks import masks

sides = st.integers(1, 40)
shapes = st.lists(
    st.tuples(sides, sides) | st.tuples(sides, sides, st.integers(1, 5), st.integers(1, 5)),
    min_size=1,
    max_size=6,
)


def densities(shape: tuple[int, ...], kernel: bool) -> float:
    """The paper's formula, before the multiplier."""
    if kernel:
        return sum(shape) / math.prod(shape)
    return (shape[0] + shape[1]) / (shape[0] * shape[1])


def by_bisection(shapes: dict[str, tuple[int, ...]], keep: float, kernel: bool) -> dict[str, float]:
    """The reference: the multiplier whose clipped densities keep the share, searched for."""
    target = round(keep * sum(math.prod(shape) for shape in shapes.values()))

    def kept(multiplier: float) -> dict[str, float]:
        return {
            name: min(1.0, multiplier * densities(shape, kernel)) * math.prod(shape)
            for name, shape in shapes.items()
        }

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle).values()) < target else (low, middle)
    return kept(high)


@given(shapes, st.floats(0.01, 1.0), st.booleans())
def test_counts_are_exact_and_within_one_of_the_solved_density(listed, keep, kernel):
    named = {str(i): shape for i, shape in enumerate(listed)}
    counts = erdos_renyi(named, keep, kernel=kernel)
    assert sum(counts.values()) == round(keep * sum(map(math.prod, listed)))
    expected = by_bisection(named, keep, kernel)
    for name, count in counts.items():
        assert 0 <= count <= math.prod(named[name])
        assert abs(count - expected[name]) <= 1 + 1e-6


def test_a_small_tensor_is_kept_whole_and_the_rest_solved_again():
    counts = erdos_renyi({"small": (3, 8), "large": (60, 30)}, 0.2)
    assert counts == {"small": 24, "large": round(0.2 * 1824) - 24}


def test_the_paper_s_vector():
    # multiplier e: e * (30 + 50) = 40, so e = 1/2: half of 20 + 10 and of 40 + 10
    assert erdos_renyi({"a": (20, 10), "b": (40, 10)}, 40 / 600) == {"a": 15, "b": 25}


def test_kernels_count_where_asked():
    named = {"conv": (16, 16, 3, 3), "linear": (48, 48)}
    plain, kernel = erdos_renyi(named, 0.3), erdos_renyi(named, 0.3, kernel=True)
    # (16 + 16) * 9 against 48 + 48; with kernels 16 + 16 + 3 + 3 against 48 + 48
    assert plain == {"conv": 1037, "linear": 345}  # 1382.4 * 3/4 and 1/4
    assert sum(plain.values()) == sum(kernel.values()) == round(0.3 * 4608)
    assert kernel == {"conv": 392, "linear": 990}  # 1382 * 38/134 and 96/134


def test_counts_make_masks():
    shapes = {"a": (30, 20), "b": (10, 5)}
    counts = erdos_renyi(shapes, 0.25)
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    assert {n: int(m.sum()) for n, m in masks(scores, counts).items()} == counts


def test_an_empty_tensor_keeps_nothing():
    assert erdos_renyi({"a": (0, 4), "b": (4, 5)}, 0.5) == {"a": 0, "b": 10}


@pytest.mark.parametrize(
    ("named", "keep", "message"),
    [
        ({"w": (3, 4)}, 0, "keep must be in"),
        ({"w": (3, 4)}, 1.5, "keep must be in"),
        ({"bias": (3,)}, 0.5, '"bias" has shape'),
        ({}, 0.5, "no shapes"),
    ],
)
def test_wrong_requests_are_refused(named, keep, message):
    with pytest.raises(RequestError, match=message):
        erdos_renyi(named, keep)
