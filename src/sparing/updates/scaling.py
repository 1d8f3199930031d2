"""What to change when the batch grows: the scaling rules that the paper compares.

Zheng et al., AAAI 2023, arXiv 2204.06240. "cowclip" is held to both tables in the README of
github.com/bytedance/LargeBatchCTR (12101b4). The released code has no other rule: rates of "linear"
are as in Goyal et al. 2017, arXiv 1706.02677, section 2.1, which leaves the penalty as it is; those
of "sqrt" as in Krizhevsky 2014, arXiv 1404.5997, which leaves open what a penalty does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown

# powers of s = batch / base_batch: rate of dense layers, rate of tables, L2 of tables
RULES: dict[str, tuple[float, float, float]] = {
    "cowclip": (0.5, 0.0, 1.0),
    "linear": (1.0, 1.0, 0.0),
    "sqrt": (0.5, 0.5, 0.5),
    "none": (0.0, 0.0, 0.0),
}


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """What to train with. ``l2`` is lambda of ``lambda * sum(w^2)``; warm-up in optimizer steps."""

    batch: int
    lr: float
    table_lr: float
    l2: float
    bound: float
    warmup_steps: int
    steps: int | None = None

    @property
    def coupled_decay(self) -> float:
        """The ``weight_decay`` of torch.optim.Adam that has the gradient of this ``l2``."""
        return 2 * self.l2


def scale_rule(
    batch: int,
    base_batch: int = 1024,
    *,
    rule: str = "cowclip",
    lr: float = 8e-4,
    table_lr: float = 1e-4,
    l2: float = 1e-5,
    bound: float = 1e-5,
    warmup: int = 0,
    samples: int | None = None,
) -> Scaled:
    """Learning rates, L2 and warm-up for a batch of ``batch`` samples.

    With s = batch / base_batch the rule multiplies the rate of dense layers, that of tables and
    the L2 of tables by: "cowclip" sqrt(s), 1, s; "linear" s, s, 1; "sqrt" sqrt(s), sqrt(s),
    sqrt(s); "none" 1, 1, 1. The bound zeta stays.

    Args:
        batch: the global batch: micro-batch times accumulation times ranks.
        base_batch: for which the values given here are right.
        rule: see above.
        lr, table_lr: rates of dense layers and of tables at ``base_batch``.
        l2: lambda of ``lambda * sum(w^2)`` over whole tables, at ``base_batch``.
        bound: zeta of the clip.
        warmup: samples over which the rate of dense layers rises; an epoch in the paper.
        samples: of the whole training, for ``steps``.

    The defaults are those published for Criteo (r = 1). The published table for Avazu departs from
    the rule in places: its bound is 1e-3 below a batch of 4,096 and 1e-4 from there on, and at
    131,072 it has a rate of 16e-4 (the rule: 11.3e-4) and an L2 of 96e-5 (the rule: 128e-5).

    Raises RequestError for an unknown rule and for numbers that make no sense.
    """
    require_whole("batch", batch, 1)
    require_whole("base_batch", base_batch, 1)
    for name, value in {"lr": lr, "table_lr": table_lr, "l2": l2, "bound": bound}.items():
        require_number(name, value, 0)
        if value == math.inf:
            raise RequestError(f"{name} must be finite, got {value}")
    require_whole("warmup", warmup, 0)
    if samples is not None:
        require_whole("samples", samples, 1)
    if rule not in RULES:
        raise unknown("scaling rule", rule, RULES)
    s = batch / base_batch
    dense, tables, penalty = (s**power for power in RULES[rule])
    return Scaled(
        batch=batch,
        lr=lr * dense,
        table_lr=table_lr * tables,
        l2=l2 * penalty,
        bound=bound,
        warmup_steps=-(-warmup // batch),
        steps=None if samples is None else -(-samples // batch),
    )
