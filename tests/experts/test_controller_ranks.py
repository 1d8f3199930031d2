from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("count", "rule"),
    [
        (2, "default"),
        (2, "published"),
        pytest.param(4, "default", marks=pytest.mark.slow),
        pytest.param(4, "published", marks=pytest.mark.slow),
    ],
)
def test_ranks_stay_bit_identical_over_fifty_updates(count, rule, tmp_path):
    script = Path(__file__).with_name("controller_worker.py")
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(count), str(tmp_path / "store"), rule],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(count)
    ]
    try:
        outputs = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * count, "\n".join(outputs)
