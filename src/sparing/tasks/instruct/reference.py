"""What counting alone reaches: the loss of completions under counts of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.tasks.instruct.examples import Examples

_SMALL = 4096
"""Vocabularies up to this size have counts of pairs."""


def _pairs(examples: Examples, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token before, token, example) of all tokens that are to be learnt of the ``chosen``."""
    owner = torch.bucketize(torch.arange(len(examples.ids)), examples.ends[1:], right=True)
    at = (examples.learnt & chosen[owner]).nonzero().flatten()
    return examples.ids[at - 1], examples.ids[at], owner[at]


def references(
    train: Examples, held: Examples, names: tuple[str, ...], vocab: int
) -> dict[str, dict[str, float]]:
    """Nats a token by method, then by source and ``"mean"``.

    "counts": how often each token is in the source's training completions, plus one;
    "pairs": the same after each token, mixed with those counts. Both are told the source, which a
    model is not.
    """
    found: dict[str, dict[str, float]] = {"counts": {}}
    if vocab <= _SMALL:
        found["pairs"] = {}
    for place, name in enumerate(names):
        before, token, _ = _pairs(train, train.source == place)
        single = torch.bincount(token, minlength=vocab).double() + 1
        single /= single.sum()
        asked, truth, owner = _pairs(held, held.source == place)
        chances = {"counts": single[truth]}
        if vocab <= _SMALL:
            seen = torch.bincount(before * vocab + token, minlength=vocab * vocab).double()
            pairs = seen.view(vocab, vocab)
            strength = 8.0  # pseudo-counts of the plain counts behind each token
            chances["pairs"] = (pairs[asked, truth] + strength * single[truth]) / (
                pairs.sum(1)[asked] + strength
            )
        for method, chance in chances.items():
            sums = torch.zeros(len(held), dtype=torch.float64).index_add(0, owner, -chance.log())
            counts = torch.bincount(owner, minlength=len(held))
            here = counts > 0
            found[method][name] = float((sums[here] / counts[here]).mean())
    for row in found.values():
        row["mean"] = sum(row.values()) / len(names)
    return found
