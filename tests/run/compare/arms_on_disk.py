"""Finished runs of several arms that look real and are not: {arm: its run directories}."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

make = runpy.run_path(str(Path(__file__).parents[2] / "fixtures" / "fake_run.py"))["make"]
NAME = "bits_per_byte"
MARGIN = "+-0.02 bits_per_byte"
VALUES = {
    "dense": [2.060, 2.090, 2.068],
    "top-k 2": [1.962, 1.982, 1.976],
    "top-k 4": [1.962, 1.981, 1.975],
}


def arms_on_disk(
    root: Path,
    values: Mapping[str, Sequence[float]] = VALUES,
    *,
    flops: float = 12e12,
    steps: int = 70,
) -> dict[str, list[Path]]:
    """Write a run for each value, seeds counting from 0; later arms cost more.

    Of 60 steps and fewer each has one evaluation, of more one at step 61 too.
    """
    found: dict[str, list[Path]] = {}
    for number, (arm, each) in enumerate(values.items()):
        for seed, value in enumerate(each):
            path = root / arm.replace(" ", "-") / f"seed-{seed}"
            make(path, steps=steps, layers=1, offset=value - 1.93, seed=seed)
            edit_recipe(path, "seed: 0", f"seed: {seed}")
            spent = int(flops * (1 + 0.3 * number))
            edit(
                path,
                metric={"name": NAME, "value": value, "higher_is_better": False},
                ledger={"flops": {"spent": spent, "dense": spent}},
                seconds=100.0 + number,
            )
            found.setdefault(arm, []).append(path)
    return found


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a run's summary."""
    file = path / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_recipe(path: Path, old: str, new: str) -> None:
    """Change a line of a run's recipe."""
    file = path / "recipe.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def diverge(path: Path, why: str = "the loss is not finite at step 20") -> None:
    """Make it a run that diverged."""
    (path / "summary.json").unlink()
    (path / "diverged.json").write_text(json.dumps({"format": 1, "step": 20, "why": why}))


def documents(path: Path, **domains: Sequence[float]) -> None:
    """Give the run scores of documents."""
    tables = {name: np.array(each, dtype=np.float64) for name, each in domains.items()}
    save_file(tables, path / "documents.safetensors")
