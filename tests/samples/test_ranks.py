"""Two gloo ranks with really different losses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_two_ranks_hold_the_same_scores_and_plans(tmp_path):
    script = Path(__file__).with_name("rank_worker.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
