"""The optimizer and the learning-rate schedule of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch

from sparing.core import registry
from sparing.run.recipe import Train


def optimizer(train: Train) -> Callable[[Any], torch.optim.Optimizer]:
    """A builder from groups of named parameters, ``{"params": [(name, parameter), ...]}``.

    Vectors (norms, biases, thresholds) are not decayed. With ``optimizer: muon``, matrices whose
    name matches none of ``adamw_names`` are Muon's; AdamW has the rest.
    """

    with_muon = train.optimizer == "muon"

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        split: dict[tuple[int, bool, bool, float], dict[str, Any]] = {}
        for number, group in enumerate(groups):
            shared = {key: value for key, value in group.items() if key != "params"}
            for name, p in group["params"]:
                matrix = p.ndim >= 2
                muon = with_muon and matrix and not _matches(name, train.adamw_names)
                rate = _rate(name, train, muon=muon)
                rule = {"rule": "muon" if muon else "adamw"} if with_muon else {}
                entry = split.setdefault(
                    (number, matrix, muon, rate),
                    {
                        "lr": rate,
                        "weight_decay": train.weight_decay if matrix else 0.0,
                        **rule,
                        **shared,
                        "params": [],
                    },
                )
                entry["params"].append((name, p))
        kind, options = _kind(train)
        built: torch.optim.Optimizer = kind(list(split.values()), lr=train.learning_rate, **options)
        return built

    return build


def _kind(train: Train) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer's class and the options that it alone has."""
    if train.optimizer == "muon":
        return registry.optimizer("muon"), {"betas": train.betas}
    if train.optimizer == "rowwise":  # AdamW but for groups to which a method gives another rule
        return registry.optimizer("rowwise"), {"betas": train.betas}
    if train.optimizer == "adam":  # its decay is coupled to the gradient
        return torch.optim.Adam, {"betas": train.betas, "fused": True}
    if train.optimizer == "sgd":
        # looking ahead needs a momentum to look along
        nesterov = train.nesterov and train.momentum > 0
        return torch.optim.SGD, {"momentum": train.momentum, "nesterov": nesterov, "fused": True}
    return torch.optim.AdamW, {"betas": train.betas, "fused": True}


def _rate(name: str, train: Train, *, muon: bool) -> float:
    for pattern, rate in train.rates.items():
        if fnmatchcase(name, pattern):
            return rate
    return train.muon_rate if muon else train.learning_rate


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def schedule(train: Train) -> Callable[[float], float]:
    """The factor of the learning rate at a share of the steps in [0, 1]."""

    def factor(done: float) -> float:
        if done < train.warmup:
            # the first step already moves
            return max(done / train.warmup, 1e-3)
        if train.schedule == "constant" or train.warmup >= 1:
            return 1.0
        left = (1.0 - done) / (1.0 - train.warmup)
        fall = left if train.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return train.final + (1 - train.final) * fall

    return factor
