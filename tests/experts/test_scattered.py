"""The Triton backend, in Triton's interpreter; no GPU is needed, and none was ever used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparing.core.errors import RequestError
from sparing.experts.experts import Experts
from sparing.experts.routing import Routing

WORKER = Path(__file__).with_name("scattered_worker.py")


def test_kernels_agree_with_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["24"]


def test_on_a_processor_the_request_is_refused() -> None:
    experts = Experts(8, 16, 2)
    routing = Routing(torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 2))
    with pytest.raises(RequestError, match='leave backend at "auto"'):
        experts(torch.zeros(3, 8), routing, backend="scattered")
