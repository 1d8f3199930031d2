"""What a pool holds in memory of each item, besides vectors."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import torch

import sparing

besides = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "held_memory.py"))[
    "besides"
]


def test_a_pool_on_the_disk_holds_at_most_100_bytes_an_item(tmp_path: Path) -> None:
    """All arrays and objects that are reached from it, but the index's vectors and codes."""
    random = np.random.default_rng(0)
    held = {}
    with sparing.Growth(tmp_path / "pool", encoder=torch.nn.Identity(), clean=False) as pool:
        for size in range(2000, 22_001, 2000):
            pool.add(torch.from_numpy(random.standard_normal((2000, 16), dtype=np.float32)))
            held[size] = besides(pool)
        assert pool.gains().shape == (22_000,)
    an_item = (held[22_000] - held[2000]) / 20_000
    assert 80 < an_item <= 100
