"""Drawing text from a causal model, from a generator of one's own, with its key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.core.modes import evaluating


def continued(
    model: nn.Module,
    prompts: Tensor,
    count: int,
    *,
    generator: torch.Generator,
    temperature: float = 1.0,
    tokens: int | None = None,
) -> Tensor:
    """Continue ``prompts`` (B, P) int64 by ``count`` tokens each: (B, count) int64 on the CPU.

    tokens: draw only among the first so many of the vocabulary.
    """
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    inputs = prompts.to(device)
    cache: Any = None
    drawn: list[Tensor] = []
    with evaluating(model):
        for _ in range(count):
            outputs = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits = outputs.logits[:, -1].float().cpu() / temperature  # (B, V)
            chances = logits[:, :tokens].softmax(dim=-1)
            following = torch.multinomial(chances, 1, generator=generator)  # (B, 1)
            drawn.append(following)
            inputs = following.to(device)
    return torch.cat(drawn, dim=1) if drawn else torch.empty(len(prompts), 0, dtype=torch.int64)


def first_token(config: Any) -> int:
    """The token that the text of a model with this configuration begins with.

    Raises RequestError for a configuration that names none.
    """
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    raise RequestError("the model names no first token (bos_token_id), to write text from")
