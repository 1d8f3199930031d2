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
    name matches none of ``adamw_names`` are Muon's, at ``muon_rate``; AdamW has the rest.
    """

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        split: list[dict[str, Any]] = []
        for group in groups:
            shared = {key: value for key, value in group.items() if key != "params"}
            kinds: dict[str, list[Any]] = {"muon": [], "matrix": [], "vector": []}
            for name, p in group["params"]:
                if p.ndim < 2:
                    kinds["vector"].append((name, p))
                elif train.optimizer == "muon" and not _matches(name, train.adamw_names):
                    kinds["muon"].append((name, p))
                else:
                    kinds["matrix"].append((name, p))
            for kind, named in kinds.items():
                if named:
                    rest = {"rule": "adamw"} if train.optimizer == "muon" else {}
                    own: dict[str, Any] = rest if kind != "muon" else {"lr": train.muon_rate}
                    decay = 0.0 if kind == "vector" else train.weight_decay
                    split.append({"weight_decay": decay, **own, **shared, "params": named})
        if train.optimizer == "muon":
            return registry.optimizer("muon")(split, lr=train.learning_rate, betas=train.betas)
        return torch.optim.AdamW(split, lr=train.learning_rate, betas=train.betas, fused=True)

    return build


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
