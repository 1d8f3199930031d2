"""Texts as vectors of a sentence encoder, to be clustered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.convert.reading import Batch, tokenizer_in
from sparing.core.errors import RequestError
from sparing.core.quiet import quietly

ROWS = 16
FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
LONGEST = 512
"""Tokens of a text that are encoded, if the encoder takes as many."""


@torch.no_grad()
def sentence_vectors(encoder: str | Path, model: Path, batches: Sequence[Batch]) -> Tensor:
    """One vector of length 1 for each sequence of the batches, (N, d) float32.

    encoder: the directory of an encoder as Hugging Face's ``save_pretrained`` writes it, with its
    tokenizer. model: that of the causal model whose tokenizer made the batches' ``input_ids``. The
    vector is the mean of the encoder's last states over a text's first tokens, as many as it takes.

    Raises RequestError for a directory that holds no encoder or no tokenizer, and for batches
    without ``input_ids``.
    """
    own, its = tokenizer_in(model), tokenizer_in(Path(encoder))
    network = _loaded(Path(encoder))
    texts: list[str] = []
    for batch in batches:
        if "input_ids" not in batch:
            raise RequestError(
                f"a sentence encoder reads text, and the batches have {', '.join(batch)} and no "
                f"input_ids; leave encoder out"
            )
        texts += own.batch_decode(batch["input_ids"], skip_special_tokens=True)
    most = min(LONGEST, its.model_max_length, _positions(network.config))
    pad = its.pad_token_id if its.pad_token_id is not None else 0
    found = []
    for at in range(0, len(texts), ROWS):
        rows = its(texts[at : at + ROWS], truncation=True, max_length=most)["input_ids"]
        ids = torch.full((len(rows), max(map(len, rows), default=1) or 1), pad)
        mask = torch.zeros_like(ids)
        for row, own_ids in enumerate(rows):
            ids[row, : len(own_ids)], mask[row, : len(own_ids)] = torch.tensor(own_ids), 1
        states = network(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(states.dtype)
        found.append((states * weight).sum(1) / weight.sum(1).clamp_min(1))
    return F.normalize(torch.cat(found))


def _positions(config: Any) -> int:
    """How many tokens the encoder takes; fewer where positions are counted from padding on."""
    most = int(getattr(config, "max_position_embeddings", None) or LONGEST)
    if config.model_type in FROM_PADDING:
        most -= 1 + int(config.pad_token_id or 0)
    return most


def _loaded(encoder: Path) -> Any:
    from transformers import AutoModel

    try:
        # a pooler that the files lack is drawn anew, and not used
        with quietly(), torch.random.fork_rng(devices=[]):
            found = AutoModel.from_pretrained(encoder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"{encoder} holds no encoder that transformers can load ({first}); give the directory "
            f"that its save_pretrained wrote"
        ) from error
    if getattr(found.config, "is_encoder_decoder", False):
        raise RequestError(f"{encoder} is an encoder with a decoder; give a plain encoder")
    return found.eval()
