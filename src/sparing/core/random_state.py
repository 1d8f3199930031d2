"""The state of all global generators, to save and to put back; this library never seeds them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """States of torch (CPU and CUDA), numpy and Python, as a state tree."""
    version, keys, gauss = random.getstate()
    name, array, pos, has, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": (version, keys, gauss),
        "numpy": (str(name), torch.from_numpy(np.asarray(array, dtype=np.int64)), pos, has, cached),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state_(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` gave."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, array, pos, has, cached = state["numpy"]
    np.random.set_state((name, array.numpy().astype(np.uint32), pos, has, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
