"""Domains of text as windows of the model's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.core.lines import kind, numbered, numbered_json
from sparing.tasks.language import corpus
from sparing.tasks.language.corpus import Split
from sparing.tasks.language.dataset import window_starts

_PIECE = 4096
"""Characters that are tokenised at once: some tokenizers take a text's length squared."""


def split_of(name: str, files: Mapping[str, str]) -> Split:
    """A domain's training and held-out text: one that is shipped, or a file of the user's."""
    if name not in files:
        return corpus.load([name])[name]
    path = Path(files[name])
    if kind(path) in (".jsonl", ".ndjson"):
        texts = []
        for number, row in numbered_json(path):
            if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
                raise RequestError(
                    f'line {number} of {path} is no object with "text"; mend or remove it'
                )
            texts.append(row["text"])
        between = "\n\n"
    else:
        texts, between = [line for _, line in numbered(path)], "\n"
    if not texts:
        raise RequestError(f'the domain "{name}" is empty: {path} has no text; leave it out')
    cut = len(texts) * 9 // 10
    return Split(
        train=between.join(texts[:cut]).encode(), held_out=between.join(texts[cut:]).encode()
    )


def windows(name: str, part: str, text: bytes, tokenizer: Any, length: int, most: int) -> Tensor:
    """Up to ``most`` windows of ``length + 1`` tokens from the start of a text, (n, length + 1).

    Raises RequestError for a text of less than one window.
    """
    whole = text.decode("utf-8", "ignore")
    ids: list[int] = []
    for start in range(0, len(whole), _PIECE):
        piece = whole[start : start + _PIECE]
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) > most * length:
            break
    starts = window_starts(len(ids), length)[:most]
    if not len(starts):
        raise RequestError(
            f'domain "{name}" has {len(ids)} tokens of {part} text, and a window takes '
            f"{length + 1}; give more text, a smaller seq_len, or leave it out of task.domains"
        )
    return torch.tensor(ids)[starts.unsqueeze(1) + torch.arange(length + 1)]
