"""The ``optimizer`` seam where a host did not build the optimizer itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparing.core.method import Method, implements
from sparing.core.sparse_gradients import check_optimizer


def regroup_(optimizer: torch.optim.Optimizer, model: nn.Module, methods: list[Method]) -> None:
    """Let methods change the groups of an optimizer that has not stepped yet, in place.

    They see all options of the groups, and ``params`` as (name, parameter); an option that a new
    group leaves out is the optimizer's default.
    """
    check_optimizer(model, optimizer)
    changing = [method for method in methods if implements(method, "optimizer")]
    if not changing:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = [
        {
            **{key: value for key, value in group.items() if key not in ("params", "param_names")},
            "params": [
                (names.get(id(p), f"unnamed.{i}"), p) for i, p in enumerate(group["params"])
            ],
        }
        for group in optimizer.param_groups
    ]
    for method in changing:
        groups = method.optimizer(model, groups)
    optimizer.param_groups.clear()
    for group in groups:
        if len(group["params"]):
            optimizer.add_param_group(group)
