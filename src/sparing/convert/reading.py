"""The batches that calibration looks at: texts of the user's, or of the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.core.decoding import continued, first_token
from sparing.core.errors import RequestError
from sparing.core.lines import numbered_json

Batch = Mapping[str, Tensor]
Batches = Iterable[Batch]
ROWS, AT_ONCE = 4, 1024


def texts_of(files: Sequence[str | Path]) -> list[str]:
    """The texts of files: of JSON lines each line's "text", of others the whole file.

    Raises RequestError for a file that cannot be read, is empty, or has a malformed line.
    """
    found: list[str] = []
    for file in map(Path, files):
        try:
            body = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{file} cannot be read as UTF-8 text ({error})") from error
        if not body.strip():
            raise RequestError(f"{file} is empty; give texts to calibrate on")
        if file.suffix not in (".jsonl", ".ndjson"):
            found.append(body)
            continue
        for number, row in numbered_json(file):
            try:
                found.append(str(row["text"]))
            except (KeyError, TypeError) as error:
                raise RequestError(
                    f'{file}, line {number}: expected a JSON object with "text" ({error!r})'
                ) from error
    return found


def packed(texts: Iterable[str], tokenizer: Any, sequences: int, length: int) -> list[Batch]:
    """Texts as batches of token sequences of one length, with labels; at most ``sequences``.

    Raises RequestError if they are shorter than one sequence of 2 tokens.
    """
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= sequences * length:
            break
    length = min(length, len(tokens))
    if length < 2:
        raise RequestError("the texts have no two tokens; give more")
    count = min(sequences, len(tokens) // length)
    return in_batches(torch.tensor(tokens[: count * length]).view(count, length))


def tokenizer_in(directory: Path) -> Any:
    """The directory's tokenizer. Raises RequestError if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        # without its files, some classes make one that knows no word
        why = "" if set(found.get_vocab()) - set(found.all_special_tokens) else "it knows no word"
    except (OSError, ValueError) as error:
        why = str(error)
    if why:
        raise RequestError(
            f"{directory} has no tokenizer to read texts with ({why}); put it beside the weights"
        )
    return found


def in_batches(ids: Tensor) -> list[Batch]:
    """Token sequences (N, S) as batches of at most ``ROWS`` and ``AT_ONCE`` tokens, with labels.

    A sequence is never cut. Importance holds the activations of a batch and the logits of a large
    vocabulary several times over.
    """
    rows = max(1, min(ROWS, AT_ONCE // max(1, ids.shape[1])))
    return [{"input_ids": part, "labels": part} for part in torch.split(ids, rows)]


def written(model: Any, sequences: int, length: int, seed: int) -> list[Batch]:
    """What a causal model writes itself, from its first token, by its own probabilities.

    Raises RequestError for a model that writes nothing, or has no first token.
    """
    config = model.config
    if not hasattr(model, "generate") or not model.can_generate():
        raise RequestError(
            f"a {type(model).__name__} writes no text to calibrate on; give texts (--text FILE) or "
            f"batches, or take a method, gate and scale that need none"
        )
    try:
        first = first_token(config)
    except RequestError as error:
        raise RequestError(f"{error}; give texts to calibrate on: --text FILE") from error
    length = min(length, getattr(config, "max_position_embeddings", length) or length)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((sequences, 1), first)
    drawn = continued(model, rows, length - 1, generator=generator)
    return in_batches(torch.cat([rows, drawn], 1))
