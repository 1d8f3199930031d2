"""Two gloo ranks with different losses hold the same weights and plans."""

from __future__ import annotations

from pathlib import Path

import forked


def test_two_ranks_mix_alike(tmp_path):
    output = forked.script(Path(__file__).with_name("mix_worker.py"), tmp_path / "store")
    assert output.count("done") == 2
