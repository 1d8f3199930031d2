"""Several examples in a row, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that is not to be learnt."""


def first_fit(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which examples share a row of ``most`` tokens: the longest first, each where it fits first.

    Rows in the order in which they were opened. At most 11/9 of the fewest rows possible, plus 1
    (Johnson 1973). An example longer than ``most`` has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[example]
        place = next((row for row, left in enumerate(room) if size <= left), None)
        if place is None:
            rows.append([])
            room.append(most)
            place = len(rows) - 1
        rows[place].append(example)
        room[place] -= size
    return rows


def laid_out(
    ids: Sequence[Tensor], learnt: Sequence[Tensor], rows: list[list[int]]
) -> dict[str, Tensor]:
    """Examples in rows, as a causal model takes them.

    ids: of each of B examples, (n,) int64; learnt: the same, bool; rows: the examples of each row.
    Gives ``input_ids``, ``labels`` (the token that follows, IGNORED where it is none of a
    completion), ``position_ids`` (from 0 in each example) and ``owner`` (-1 for padding), all
    (R, S) int64; and ``attention_mask``: (R, S) int64 where each row holds one example, else
    (R, 1, S, S) bool, who sees whom: earlier tokens of the same example. Padding sees the row's
    first token only, and not itself, which is how it is told from what is real.
    """
    longest = max(sum(len(ids[i]) - 1 for i in row) for row in rows)
    shape = (len(rows), longest)
    inputs, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels, owner = torch.full(shape, IGNORED), torch.full(shape, -1)
    for number, row in enumerate(rows):
        at = 0
        for example in row:
            size = len(ids[example]) - 1
            part = slice(at, at + size)
            inputs[number, part] = ids[example][:-1]
            following = ids[example][1:]
            labels[number, part] = torch.where(learnt[example][1:], following, IGNORED)
            positions[number, part] = torch.arange(size)
            owner[number, part] = example
            at += size
    real = owner >= 0
    mask: Tensor = real.long()
    if any(len(row) > 1 for row in rows):
        same = (owner[:, :, None] == owner[:, None, :]) & real[:, :, None]
        mask = same & torch.ones(longest, longest, dtype=torch.bool).tril()
        mask[:, :, 0] |= ~real
        mask = mask[:, None]
    return {
        "input_ids": inputs,
        "labels": labels,
        "attention_mask": mask,
        "position_ids": positions,
        "owner": owner,
    }
