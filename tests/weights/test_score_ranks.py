from __future__ import annotations

from pathlib import Path

import forked


def test_two_ranks_score_by_the_data_of_both(tmp_path):
    forked.script(Path(__file__).with_name("rank_worker.py"), tmp_path / "store")
