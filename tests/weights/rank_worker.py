"""Two ranks that each score their own part of the data; run by test_score_ranks.py."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forked
from sparing.core import ranks
from sparing.core.errors import RequestError
from sparing.weights.masks import masks
from sparing.weights.scores import fisher, grasp, iterative_snip, snip

KEEP = 0.3


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def iterated(*args: Any) -> dict[str, Tensor]:
    return iterative_snip(*args, keep=KEEP, steps=3)


def work(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model[2].weight.zero_()
    named = {"in": model[0].weight, "out": model[2].weight}
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (20,), generator=generator)
    # unequal parts, in unequal numbers of batches
    parts = [[(x[:3], y[:3]), (x[3:12], y[3:12])], [(x[12:], y[12:])]]
    for score in (snip, iterated, grasp, fisher):
        found = score(model, named, parts[rank], loss)
        ranks.agree(score.__name__, found)
        ranks.agree(f"masks by {score.__name__}", masks(found, KEEP))
        # with both parts on both ranks the sums double and the mean is that of all data
        whole = score(model, named, [*parts[0], *parts[1]], loss)
        for name in named:
            torch.testing.assert_close(found[name], whole[name], rtol=1e-9, atol=1e-12)
    # a rank without data leaves it to the others; if none has any, all say so
    ranks.agree("one without", snip(model, named, parts[0] if rank else [], loss))
    with pytest.raises(RequestError, match="no batch to score by"):
        snip(model, named, [], loss)


if __name__ == "__main__":
    forked.ranks(work, sys.argv[1])
