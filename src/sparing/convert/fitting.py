"""Gates, scales and biases fitted to what the dense block computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.convert.clusters import balanced_kmeans
from sparing.convert.split import Split, sizes

CHUNK = 1024
FIRST_STEPS, THEN_STEPS = 150, 150
FIRST_RATE, THEN_RATE = 0.05, 0.01
WARMTHS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5)
"""Sizes of the logits that a fit of the weights may start from."""
EXCHANGES = 2
"""How often each of the experts that a token chose gives up its place to a better one."""

Weigh = Callable[[Tensor, Tensor], Tensor]
"""Inputs (T, d) and a gate (E, d) to the routed experts' weights (T, E), 0 where not chosen."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a block's experts give on a sample of its inputs.

    x: (T, d) inputs; outputs: (E, T, d) of each routed expert, without bias; target: (T, d), what
    they are to add up to: the dense output less that of the units that are always on.
    """

    x: Tensor
    outputs: Tensor
    target: Tensor

    @property
    def gram(self) -> Tensor:
        """Products of the experts' outputs, (T, E, E)."""
        return torch.einsum("etd,ftd->tef", self.outputs, self.outputs)

    @property
    def onto(self) -> Tensor:
        """Products of the experts' outputs with the target, (T, E)."""
        return torch.einsum("etd,td->te", self.outputs, self.target)


@torch.no_grad()
def sample(x: Tensor, hidden: Tensor, down: Tensor, split: Split) -> Sample:
    """x: (T, d), hidden: (T, f) of the dense block on it, down: (d, f)."""
    filled = F.pad(hidden, (0, 1))  # unit -1 is zeros
    columns = F.pad(down, (0, 1))
    outputs = torch.stack([filled[:, units] @ columns[:, units].t() for units in split.index])
    own = split.shared
    target = hidden @ down.t() - filled[:, own] @ columns[:, own].t()
    return Sample(x=x, outputs=outputs, target=target)


def softmax_top_k(k: int) -> Weigh:
    """Weights of the k experts with the highest logits: their softmax, which sums to 1."""

    def weigh(x: Tensor, gate: Tensor) -> Tensor:
        logits = F.linear(x, gate)
        top = logits.topk(k, dim=1)
        return torch.zeros_like(logits).scatter(1, top.indices, top.values.softmax(1))

    return weigh


@torch.no_grad()
def best_choice(found: Sample, k: int) -> Tensor:
    """The k experts of each token that matter most, (T, E) bool, with weight 1.

    Greedily: each next one takes most off the squared distance to the target. Then each gives its
    place to the one that fits best beside the others, itself included: where outputs oppose each
    other the first choice is often wrong alone and right in company, or the reverse.
    """
    gram, left = found.gram, found.onto.clone()
    chosen = torch.zeros_like(left, dtype=torch.bool)
    own = gram.diagonal(dim1=1, dim2=2)
    rows = torch.arange(len(left))
    picked: list[Tensor] = []

    def take() -> None:
        best = (2 * left - own).masked_fill(chosen, -torch.inf).argmax(1)
        chosen[rows, best] = True
        left.sub_(gram[rows, best])
        picked.append(best)

    for _ in range(k):
        take()
    for _ in range(EXCHANGES * k if k < left.shape[1] else 0):
        oldest = picked.pop(0)
        chosen[rows, oldest] = False
        left += gram[rows, oldest]
        take()
    return chosen


def distilled(found: Sample, k: int, generator: torch.Generator) -> Tensor:
    """A gate (E, d) by which softmax top-k comes near the dense output.

    First it learns to name the experts that matter most (``best_choice``), then, with its scale,
    to make the weighted sum near, under the weighting of the exported model. Full batches, in
    inputs of unit spread.
    """
    x, gram, onto = found.x, found.gram, found.onto
    power = found.target.square().sum(1).mean().clamp_min(1e-30)
    spread = x.std(0).clamp_min(1e-6) if len(x) > 1 else torch.ones(x.shape[1])
    inputs = x / spread
    matters = best_choice(found, k).float() / k
    count = found.outputs.shape[0]
    rows = (torch.randn(count, x.shape[1], generator=generator) * 1e-2).requires_grad_(True)
    weigh = softmax_top_k(k)

    def apart(size: Tensor, gate: Tensor) -> Tensor:
        """The squared distance to the target, as a share of its power, less 1."""
        a = size * weigh(inputs, gate)
        inside = torch.einsum("te,tef,tf->t", a, gram, a) - 2 * (a * onto).sum(1)
        return inside.mean() / power

    def size_of(gate: Tensor) -> Tensor:
        return least_squares(weigh(inputs, gate), gram, onto).clamp_min(1e-3).float()

    with torch.enable_grad():
        _descend([rows], lambda: _named(inputs @ rows.t(), matters), FIRST_STEPS, FIRST_RATE)
        # a size of its own, so that evening the weights out does not change who is chosen; naming
        # experts surely asks for large logits, and weights that fit may need far smaller ones
        named = rows.detach()
        begin = min(WARMTHS, key=lambda w: float(apart(size_of(w * named), w * named)))
        warmth = torch.tensor(begin).log().requires_grad_(True)
        size = size_of(begin * named).log().requires_grad_(True)
        best = (float("inf"), named.clone())

        def distance() -> Tensor:
            nonlocal best
            gate = warmth.exp() * rows
            found = apart(size.exp(), gate)
            if float(found.detach()) < best[0]:
                best = (float(found.detach()), gate.detach().clone())
            return found

        _descend([rows, size, warmth], distance, THEN_STEPS, THEN_RATE)
    return (best[1] / spread).contiguous()


@torch.no_grad()
def centroids(x: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """Rows of a gate from balanced k-means of inputs, (E, d), scaled to spread the logits by 1.

    LLaMA-MoE v2 (arXiv 2411.15708) initialises gates so. Inputs are scaled to length 1.
    """
    _, found = balanced_kmeans(x, sizes(len(x), experts), generator, cosine=True, rounds=10)
    return unit_logits(found - found.mean(0), x)


def unit_logits(gate: Tensor, x: Tensor) -> Tensor:
    """The gate, scaled so that the logits of x: (T, d) have standard deviation 1."""
    spread = float(F.linear(x, gate).std())
    return gate / spread if spread > 0 else gate


def least_squares(weights: Tensor, gram: Tensor, onto: Tensor) -> Tensor:
    """The scale s of the weighted sum that is nearest to the target, a scalar.

    weights: (T, E); gram: (T, E, E), onto: (T, E) as of Sample. 0 / 0 is 1.
    """
    above = (weights * onto).sum(dtype=torch.float64)
    below = torch.einsum("te,tef,tf->", weights.double(), gram.double(), weights.double())
    return above / below if below > 0 else torch.ones_like(above)


@torch.no_grad()
def calibrated(found: Sample, weights: Tensor, shift: Tensor | None = None) -> float:
    """The scale by least squares; shift: (T, d), what biases add already. At least 1e-3."""
    target = found.target if shift is None else found.target - shift
    onto = torch.einsum("etd,td->te", found.outputs, target)
    return max(float(least_squares(weights, found.gram, onto)), 1e-3)


@torch.no_grad()
def mean_biases(found: Sample, weights: Tensor) -> Tensor:
    """Biases (E, d) that add the mean outputs of the experts that were not chosen.

    The mean m_e is over the tokens that did not choose e. A token's weights sum to 1, so that the
    bias M - k m_e, with M the sum of all means, adds the missing means exactly where the k chosen
    experts weigh the same.
    """
    chosen = weights > 0
    missing = (~chosen).float()
    sums = torch.einsum("te,etd->ed", missing, found.outputs)
    means = sums / missing.sum(0).clamp_min(1)[:, None]
    k = chosen.float().sum(1).mean()
    return means.sum(0, keepdim=True) - k * means


@torch.no_grad()
def fitted_biases(found: Sample, weights: Tensor, scale: float) -> Tensor:
    """The biases (E, d) that come nearest to the target by least squares, given the scale.

    A little ridge keeps those of experts that no token chose at 0.
    """
    rest = found.target - scale * torch.einsum("te,etd->td", weights, found.outputs)
    w = weights.double()
    normal = w.t() @ w + 1e-6 * len(w) * torch.eye(w.shape[1], dtype=torch.float64)
    found_biases: Tensor = torch.linalg.solve(normal, w.t() @ rest.double())
    return found_biases.float()


def _named(logits: Tensor, matters: Tensor) -> Tensor:
    return -(matters * logits.log_softmax(1)).sum(1).mean()


def _descend(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
