"""Which precision is faster for this model here: measured, since no rule of thumb holds.

On CPUs without matrix units bf16 was seen two times slower than fp32 on small models, and faster
on larger ones.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import nn

from sparing.hosts.per_sample import Losses

REPEATS = 3


def probe(model: nn.Module, losses: Losses, batch: Any, device: torch.device) -> dict[str, float]:
    """Median seconds of a forward and backward pass, by precision, on a copy of the model."""
    copied = copy.deepcopy(model).to(device).train()
    found: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with torch.random.fork_rng(devices=[]):
        for attempt in range(REPEATS + 1):
            for name, times in found.items():
                begun = time.perf_counter()
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16"):
                    loss = losses(copied, batch)[0].mean()
                torch.autograd.backward(loss)
                copied.zero_grad(set_to_none=True)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if attempt:  # the first pass warms up
                    times.append(time.perf_counter() - begun)
    return {name: statistics.median(times) for name, times in found.items()}
