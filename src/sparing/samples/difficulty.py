"""Scores of how much a sample matters, from one look at it: for static coresets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def el2n(logits: Tensor, targets: Tensor) -> Tensor:
    """The length of the error vector: logits (B, C), targets (B,) int64 -> (B,) float32.

    Paul et al. 2021 (arXiv 2107.07075), definition 2.2: the norm of softmax minus one-hot.
    """
    error = logits.float().softmax(1) - F.one_hot(targets, logits.shape[1])
    return error.square().sum(1).sqrt()


@torch.no_grad()
def el2n_of_losses(logits: Tensor, losses: Tensor) -> Tensor:
    """``el2n`` without targets, where the losses (B,) are plain cross-entropies of the logits.

    The target's probability is exp(-loss), so the squared norm is sum(p^2) - 2 exp(-loss) + 1.
    """
    square = logits.float().softmax(1).square().sum(1)
    return (square - 2 * (-losses.detach().float()).exp() + 1).clamp(min=0).sqrt()


@torch.no_grad()
def correct_of_losses(logits: Tensor, losses: Tensor) -> Tensor:
    """1 where the target is the most likely class, else 0, from plain cross-entropies: (B,)."""
    best = logits.float().log_softmax(1).amax(1)
    return (-losses.detach().float() >= best - 1e-4).float()


@torch.no_grad()
def grand(logits: Tensor, targets: Tensor, features: Tensor, *, bias: bool = True) -> Tensor:
    """The norm of a sample's gradient at the last layer, (B,).

    Paul et al. 2021 (arXiv 2107.07075), definition 2.1, of the last layer only: there the
    gradient is the outer product of the error vector and the features (B, d) (and a 1 for the
    bias), whose norm is the product of norms. Nothing is run backward.
    """
    square = features.detach().float().square().sum(1)
    return el2n(logits, targets) * (square + 1 if bias else square).sqrt()


@torch.no_grad()
def herding(features: Tensor, count: int) -> Tensor:
    """Samples whose mean stays nearest to the mean of all: (N, d) -> (count,) int64, in order.

    Welling 2009. Greedy: one product (N, d) by (d,) for each sample chosen.
    """
    wide = features.float()
    mean = wide.mean(0)
    missing = mean.clone()
    free = torch.ones(len(wide), dtype=torch.bool)
    found = torch.empty(count, dtype=torch.int64)
    for place in range(count):
        value = (wide @ missing).masked_fill(~free, -torch.inf)
        best = value.argmax()
        found[place] = best
        free[best] = False
        missing += mean - wide[best]
    return found


@torch.no_grad()
def k_centre(features: Tensor, count: int, first: int = 0) -> Tensor:
    """Samples that lie far from each other: (N, d) -> (count,) int64, in order, from ``first`` on.

    Sener and Savarese 2018 (arXiv 1708.00489), the greedy rule: the next is the one farthest from
    all that are chosen, within twice the best possible radius. One distance (N,) for each chosen.
    """
    wide = features.float()
    found = torch.empty(count, dtype=torch.int64)
    distance = torch.full((len(wide),), torch.inf)
    best = torch.tensor(first)
    for place in range(count):
        found[place] = best
        distance = torch.minimum(distance, (wide - wide[best]).square().sum(1))
        distance[best] = -1.0  # never again, however many are alike
        best = distance.argmax()
    return found
