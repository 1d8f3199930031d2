"""Balanced k-means: clusters of equal size, for hidden units, texts and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 20


@torch.no_grad()
def balanced_kmeans(
    rows: Tensor,
    sizes: Sequence[int],
    generator: torch.Generator,
    *,
    cosine: bool = False,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Assign each row to one of len(sizes) clusters of exactly those sizes.

    rows: (N, d), N = sum(sizes). Returns labels (N,) int64 and centroids (E, d). Rows are taken in
    the order of what they would lose by their second choice, which is the greedy form of the
    assignment in LLaMA-MoE's size-constrained k-means (arXiv 2406.16554, section 3.1). ``cosine``
    scales rows to length 1 first. Ties go to the lower cluster; the best of all rounds is kept.
    """
    x = rows.double()
    if cosine:
        x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    centroids = _spread(x, len(sizes), generator)
    best: tuple[float, Tensor] | None = None
    for _ in range(rounds):
        distances = torch.cdist(x, centroids).square()
        labels = assign(distances, sizes)
        cost = float(distances.gather(1, labels[:, None]).sum())
        if best is not None and cost >= best[0] * (1 - 1e-9):
            break
        best = (cost, labels)
        centroids = means(x, labels, len(sizes))
    assert best is not None
    return best[1], means(x, best[1], len(sizes)).to(torch.float32)


def assign(costs: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows to clusters of given sizes at low total cost; costs: (N, E) -> (N,) int64.

    In each pass all open rows ask for their best cluster that has room; a cluster with too many
    takes those that would lose most elsewhere. At most E passes, no loop over rows.
    """
    n, count = costs.shape
    room = torch.tensor(list(sizes))
    labels = torch.full((n,), -1, dtype=torch.int64)
    while bool((open_rows := labels < 0).any()):
        waiting = open_rows.nonzero().flatten()
        allowed = costs[waiting].masked_fill(room <= 0, torch.inf)
        two = allowed.topk(min(2, count), dim=1, largest=False)
        wanted = two.indices[:, 0]
        loss = two.values[:, -1] - two.values[:, 0]
        order = loss.argsort(descending=True, stable=True)
        for cluster in range(count):
            if room[cluster] <= 0:
                continue
            asking = order[wanted[order] == cluster][: int(room[cluster])]
            labels[waiting[asking]] = cluster
            room[cluster] -= len(asking)
    return labels


def means(x: Tensor, labels: Tensor, count: int) -> Tensor:
    """The mean row of each cluster, (E, d); zeros for an empty one."""
    sums = x.new_zeros(count, x.shape[1]).index_add_(0, labels, x)
    return sums / torch.bincount(labels, minlength=count).clamp_min(1)[:, None]


def _spread(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Starting centroids far from each other (k-means++)."""
    first = int(torch.randint(len(x), (1,), generator=generator))
    chosen = [first]
    nearest = (x - x[first]).square().sum(1)
    for _ in range(count - 1):
        weights = nearest if bool(nearest.sum() > 0) else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
    return x[chosen].clone()
