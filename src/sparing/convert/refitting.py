"""Last projections fitted to the dense output: what remains of a block is put to its best use.

Given who is chosen and with what weight, the sum of the chosen experts is linear in their last
projections, so that the nearest ones to the dense output are those of a ridge regression, in closed
form. The same is done to the units that a cut block keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Tried on tokens left out of the fit; as shares of each feature's own power."""
FOURTH = 4
"""One token in so many is left out to choose by."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Refitted:
    """Last projections that add up nearest to the dense output.

    down: (E, d, u) of the routed experts, as they are stored, scale included, 0 where a unit only
    fills; always: (d, s) of the units that are always on; bias: (E, d), None where none was asked.
    """

    down: Tensor
    always: Tensor
    bias: Tensor | None


@torch.no_grad()
def refit(
    hidden: Tensor,
    target: Tensor,
    weights: Tensor,
    index: Tensor,
    shared: Tensor,
    down: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Refitted:
    """Fit the last projections of routed and shared units, and biases where some are given.

    hidden: (T, f) of the dense block; target: (T, d), its output without bias; weights: (T, E);
    index: (E, u), -1 where a unit only fills; shared: (s,); down: (d, f), scale and bias: (E, d)
    or None, where the fit begins and what it is drawn to.
    """
    experts, units = index.shape
    filled = F.pad(hidden, (0, 1))  # unit -1 is zeros
    columns = F.pad(down, (0, 1))
    routed = (filled[:, index.flatten()].view(-1, experts, units) * weights[:, :, None]).flatten(1)
    features = [routed, filled[:, shared]]
    start = [scale * columns[:, index.flatten()].t(), columns[:, shared].t()]
    if bias is not None:
        features.append(weights)
        start.append(bias)
    found = ridge(torch.cat(features, 1), target, torch.cat(start))
    lengths = [experts * units, len(shared), *([experts] if bias is not None else [])]
    parts = torch.split(found, lengths)
    width = target.shape[1]
    return Refitted(
        down=parts[0].view(experts, units, width).transpose(1, 2).contiguous(),
        always=parts[1].t().contiguous(),
        bias=parts[2].contiguous() if bias is not None else None,
    )


@torch.no_grad()
def ridge(features: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """The coefficients (F, d) near ``start`` that bring ``features`` (T, F) nearest to the target.

    The strength of the pull to ``start``, in each feature's own power, is chosen among RIDGES on a
    fourth of the tokens; fewer than 8 tokens leave ``start`` as it is.
    """
    if len(target) < 2 * FOURTH:
        return start
    wide = features.double()
    rest = target.double() - wide @ start.double()
    out = torch.arange(len(target)) % FOURTH == FOURTH - 1
    fitted, held = wide[~out], wide[out]
    normal, onto = fitted.t() @ fitted, fitted.t() @ rest[~out]
    tried = [_solved(normal, onto, strength) for strength in RIDGES]
    errors = [float((rest[out] - held @ change).square().sum()) for change in tried]
    if min(errors) >= float(rest[out].square().sum()):
        return start  # no fit carries over to other tokens
    best = RIDGES[errors.index(min(errors))]
    normal += held.t() @ held
    onto += held.t() @ rest[out]
    return (start.double() + _solved(normal, onto, best)).to(start.dtype)


def _solved(normal: Tensor, onto: Tensor, strength: float) -> Tensor:
    pull = strength * normal.diagonal()
    # a feature that never occurs keeps its start
    pull += 1e-9 * pull.mean().clamp_min(1e-30)
    found: Tensor = torch.linalg.solve(normal + pull.diag(), onto)
    return found
