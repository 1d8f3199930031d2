"""What a routed method would spend if chance chose the experts: options of random routing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def random_experts(
    options: Mapping[str, Any], experts: int, mean_k: float
) -> dict[str, dict[str, Any]]:
    """Random routing over as many experts of the same size, ``mean_k`` of them for each token."""
    shared = {key: options[key] for key in ("where", "width", "init", "zero_output")}
    return {"random": {"experts": experts, "k": min(float(mean_k), float(experts)), **shared}}
