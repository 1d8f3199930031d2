"""Encoded examples in two flat tensors; batches of them, packed or padded."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.tasks.instruct.packing import first_fit, laid_out
from sparing.tasks.instruct.tokens import Tokens, encoded


@final
class Examples:
    """All sources' examples, numbered source by source.

    rows: (source, where, row) of each. ``seq_len``: tokens of an example, and of a packed row.
    Raises RequestError for a row that is no example, naming where it stands.
    """

    def __init__(
        self,
        rows: Iterable[tuple[int, str, Any]],
        tokens: Tokens,
        *,
        seq_len: int,
        pack: bool,
    ) -> None:
        ids, learnt = array("i"), array("b")  # lists would take 16 bytes a token
        ends, sources = [0], []
        for source, where, row in rows:
            one, said = encoded(row, tokens, where, seq_len + 1)
            ids.extend(one)
            learnt.extend(said)
            ends.append(len(ids))
            sources.append(source)
        if not sources:
            raise RequestError("there are no examples")
        self.ids = torch.frombuffer(ids, dtype=torch.int32).long()
        self.learnt = torch.frombuffer(learnt, dtype=torch.int8).bool()
        self.ends, self.source = torch.tensor(ends), torch.tensor(sources)
        self.seq_len, self.pack = seq_len, pack

    def __len__(self) -> int:
        return self.source.numel()

    def lengths(self, index: Tensor) -> Tensor:
        """Tokens that a model reads of each: (B,)."""
        return self.ends[index + 1] - self.ends[index] - 1

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """``index``: (B,) int64; see ``packing.laid_out``. ``count``: (B,) tokens to learn."""
        pairs = list(zip(self.ends[index].tolist(), self.ends[index + 1].tolist(), strict=True))
        ids = [self.ids[a:b] for a, b in pairs]
        learnt = [self.learnt[a:b] for a, b in pairs]
        rows = [[i] for i in range(len(pairs))]
        if self.pack:
            rows = first_fit([b - a - 1 for a, b in pairs], self.seq_len)
        batch = laid_out(ids, learnt, rows)
        batch["count"] = torch.stack([part[1:].sum() for part in learnt])
        return batch

    def domain_of(self, index: Tensor) -> Tensor:
        """(B,) int64 -> (B,) int64, positions of sources."""
        return self.source[index]

    def fingerprint(self) -> str:
        """SHA-256 over tokens, borders and sources."""
        digest = hashlib.sha256()
        for part in (self.ids, self.learnt.long(), self.ends, self.source):
            digest.update(part.numpy().astype("<i8").tobytes())
        return digest.hexdigest()
