"""The samples of the task: tokenised texts with labels, whole batches at a time."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sparing.tasks.text.sources import Labelled
from sparing.tasks.text.tokens import Tokens


@final
class Texts:
    """``data`` and its ``tokens``, which stand for the same texts in the same order."""

    def __init__(self, data: Labelled, tokens: Tokens) -> None:
        assert len(data) == len(tokens)
        self.data, self.tokens = data, tokens

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """``index`` (B,) int64 -> ids and mask, see ``Tokens.batch``, and ``labels`` (B,)."""
        index = index.long()
        return {**self.tokens.batch(index), "labels": self.data.labels[index]}
