from __future__ import annotations

from pathlib import Path

import torch
from cowclip_worker import CASES, DECAYED, LATE, trained

import forked


def test_two_ranks_are_one_process_on_the_joined_batch(tmp_path, monkeypatch):
    worker = Path(__file__).with_name("cowclip_worker.py")
    monkeypatch.setenv("PYTHONPATH", str(worker.parent), prepend=":")
    forked.script(worker, tmp_path / "store", tmp_path / "model")
    with torch.sparse.check_sparse_tensor_invariants(False):
        alone = trained({"reduce": "host"}, False, None).state_dict()
    for name, _, _ in CASES:
        for rank in range(2):
            found = torch.load(f"{tmp_path / 'model'}-{name}-{rank}")
            for key, tensor in alone.items():
                torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)
    with torch.sparse.check_sparse_tensor_invariants(False):
        alone = trained({"reduce": "host", "mode": "dense", **DECAYED}, False, None).state_dict()
    for name, _, _ in LATE:  # ranks read, and so round, different rows, and agree to the last bit
        for rank in range(2):
            found = torch.load(f"{tmp_path / 'model'}-{name}-{rank}")
            for key, tensor in alone.items():
                torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
