"""A look at each source between steps: losses and gate loads of fresh samples, in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparing.core import ranks
from sparing.core.errors import RequestError
from sparing.core.loads import watched
from sparing.core.modes import evaluating
from sparing.samples import draw
from sparing.samples.mixing_plan import Members, tensor


def look(
    model: nn.Module,
    members: Members,
    *,
    read: Callable[[Tensor], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    samples: int,
    seed: int,
    tick: int,
) -> tuple[Tensor, list[Tensor]]:
    """Losses (D,) float64, and for each expert layer its loads (D, E) int64, over all ranks.

    ``samples`` of each source, other ones at every ``tick`` (the released code looks at the same
    80 each time), shared out over the ranks; fewer where a source has fewer. Every rank runs the
    model equally often. A source without samples has a loss of NaN and loads of 0.
    """
    world, rank = ranks.world_size(), ranks.rank()
    sources = members.sizes.size
    sums = torch.zeros(sources, 2, dtype=torch.float64)
    loads: list[Tensor] = []
    random = draw.generator(seed, 2**32 + tick)
    with evaluating(model), torch.no_grad():
        for source in range(sources):
            size = int(members.sizes[source])
            if not size:
                continue
            drawn = random.choice(size, min(samples, size), replace=False, shuffle=False)
            mine = drawn[rank::world]
            counted = len(mine)  # a rank without a share runs one all the same, and counts nothing
            chosen = members.members(source)[mine if counted else drawn[:1]]
            with watched(model) as found:
                mean = loss(model, read(tensor(chosen)))
            sums[source] += torch.tensor([float(mean) * counted, counted])
            for layer, counts in enumerate(found):
                if not counts.numel():
                    raise RequestError(
                        "an expert layer was not called by the loss of a batch; give gate loads "
                        "by measure=... instead"
                    )
                if len(loads) <= layer:
                    loads.append(torch.zeros(sources, counts.numel(), dtype=torch.int64))
                loads[layer][source] += counts * bool(counted)
    ranks.sum_([sums, *loads])
    return sums[:, 0] / sums[:, 1], loads
