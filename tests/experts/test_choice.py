"""The choice of a backend against the committed record of what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparing.experts.backends import choose_backend

RECORD = Path(__file__).parents[2] / "benchmarks" / "records" / "backend_crossovers.json"
NEAR = 1.15


def points() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RECORD.read_text())["results"]["points"]
    return found


def slowdown(point: dict[str, Any]) -> float:
    """How many times the fastest backend's median the chosen one's is."""
    chosen = choose_backend(
        device="cpu",
        dtype=getattr(torch, point["dtype"]),
        rows=point["rows"],
        experts=point["experts"],
        aligned=True,
        grad=point["grad"],
    )
    times = {name: found["median"] for name, found in point["microseconds"].items()}
    return float(times[chosen] / min(times.values()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grad", [False, True])
def test_every_kind_of_load_is_measured(dtype: str, grad: bool) -> None:
    here = [p for p in points() if p["dtype"] == dtype and p["grad"] == grad]
    each = [p["rows"] / p["experts"] for p in here]
    assert min(each) < 0.1
    assert max(each) > 100
    assert {p["tokens"] for p in here} >= {1, 4, 16, 64, 256}


def test_the_choice_is_near_the_fastest() -> None:
    factors = [slowdown(point) for point in points()]
    near = sum(factor <= NEAR for factor in factors)
    assert near >= 0.9 * len(factors)
    assert max(factors) < 1.5


def test_no_single_backend_would_do() -> None:
    for name in ("loop", "grouped", "padded"):
        near = 0
        for point in points():
            times = {backend: found["median"] for backend, found in point["microseconds"].items()}
            near += times[name] <= NEAR * min(times.values())
        assert near < 0.9 * len(points())
