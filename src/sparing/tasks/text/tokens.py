"""Texts as token ids: made once, kept as one row of numbers, padded batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from torch import Tensor

MULTIPLE: Final = 8
"""Batches are as long as their longest text, rounded up to this: few shapes, little padding."""
PAD: Final = 0
BEGIN: Final = 1
FIRST_BYTE: Final = 2
BYTE_VOCABULARY: Final = FIRST_BYTE + 256


@final
@dataclass(frozen=True, slots=True)
class Tokens:
    """``flat``: the ids of all texts on end, int32; text i is ``flat[ends[i-1]:ends[i]]``.

    ``pad``: the id that fills up a batch. ``most``: what a batch is padded to at most.
    """

    flat: Tensor
    lengths: Tensor
    pad: int
    most: int

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]], *, pad: int, most: int) -> Tokens:
        """From one list of ids for each text, none longer than ``most``."""
        parts = [np.asarray(row, dtype=np.int32) for row in rows]
        flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        lengths = torch.tensor([len(part) for part in parts], dtype=torch.int64)
        return cls(torch.from_numpy(flat), lengths, pad, most)

    def __len__(self) -> int:
        return int(self.lengths.numel())

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """``index`` (B,) -> ``input_ids`` and ``attention_mask``, (B, S) int64 each.

        S is the longest text's length, rounded up to a multiple of ``MULTIPLE``, but not beyond
        ``most``: an encoder has no positions there.
        """
        lengths = self.lengths[index]  # (B,)
        longest = int(lengths.max()) if len(lengths) else 0
        places = torch.arange(min(-(-longest // MULTIPLE) * MULTIPLE, self.most))  # (S,)
        mask = places < lengths.unsqueeze(1)  # (B, S)
        starts = (self.lengths.cumsum(0) - self.lengths)[index]
        ids = torch.full(mask.shape, self.pad, dtype=torch.int64)
        ids[mask] = self.flat[(starts.unsqueeze(1) + places)[mask]].long()
        return {"input_ids": ids, "attention_mask": mask.long()}


def of_bytes(texts: Sequence[str], max_length: int) -> Tokens:
    """A mark of the beginning, then one token for each byte of UTF-8."""
    rows = (
        [BEGIN, *(byte + FIRST_BYTE for byte in text.encode()[: max_length - 1])] for text in texts
    )
    return Tokens.of(rows, pad=PAD, most=max_length)
